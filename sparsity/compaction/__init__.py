"""Exact removal of dead structure: the smaller network that computes what a pruned one computes, and the way back."""

import logging
from collections.abc import Callable, Sequence

from sparsity.compaction.checking import responses, trouble
from sparsity.compaction.slices import Compacted, whole
from sparsity.compaction.structure import Structure
from sparsity.data import Splits
from sparsity.errors import reason
from sparsity.population import Population

__all__ = ["Compacted", "compact", "whole"]

log = logging.getLogger("sparsity")


def compact(population: Population, splits: Splits) -> Compacted:
    """The population without what affects neither an output nor a gradient of the loss, masks as given.

    An entry is dead for good where it is 0 and its mask or its module holds it there. From this follow, to the fixed
    point, two kinds of dead units, as the recorded graph couples channels:

    - silent ones: 0 whatever the images are. A live bias makes a unit a trained constant, which stays; so does
      sigmoid(0), unlike in an artifact, where the next bias holds it: here its readers learn from it.
    - unread ones: no live weight of a unit that is itself needed reads them.

    The loss gives the entries of a dead unit, and the weights that read it, a gradient of exactly 0. Some of them are
    not 0, such as the bias of an unread unit. They come back from `restore` as they were, which is what training the
    full network makes of them as long as the optimizer works element by element, and are counted as before. Weight
    decay alone would shrink them there: they then differ from those of the full network, as do the running statistics
    of dead channels; nothing reads either.

    Images lose the pixels that no member reads, where a linear layer alone reads them, flattened. Members have dead
    units at different places and in different number: of units alike each keeps as many as the member with the most,
    so that some of the others' stay. Whatever the module does to defeat the proof, such as a hard-coded size, shows in
    outputs and gradients on a few images: the units that do not pass are kept.
    """
    structure = Structure.of(population, splits)
    expected = responses(population, splits) if structure.dead else []

    def works(kinds: Sequence[int]) -> bool:
        try:
            found = trouble(structure.without(kinds), expected)
        except Exception as error:  # whatever a module may raise on shapes that it was not written for
            found = reason(error)
        if found is not None:
            log.info(f"not all that is dead in {structure.names(kinds)} is left out: {found}")
        return found is None

    return structure.without(_most(structure.dead, works))


def _most(kinds: Sequence[int], works: Callable[[Sequence[int]], bool]) -> Sequence[int]:
    """Of some kinds those that work together, found by halves."""
    if not kinds or works(kinds):
        return kinds
    middle = len(kinds) // 2
    if not middle:
        return []
    halves = _most(kinds[:middle], works), _most(kinds[middle:], works)
    both = [*halves[0], *halves[1]]
    return both if not all(halves) or works(both) else max(halves, key=len)
