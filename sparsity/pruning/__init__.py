"""Pruning rules in three parts: how much an entry matters, what is kept or removed as one, and from where on it goes.

`importance` gives each entry of a weight a score, `unit` each entry the score of the unit that it is of, and `cut` the
threshold: an entry stays if its unit scores at least that.
"""
