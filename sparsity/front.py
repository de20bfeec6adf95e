"""Objectives of a search, and which way each is better."""

OBJECTIVES = {"accuracy": "maximize", "compression": "maximize", "macs": "minimize", "nonzero": "minimize"}
