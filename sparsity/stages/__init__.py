"""The stages that recipes are made of: each maps a population to an outcome, and knows no other stage."""

from sparsity.stages.context import DEEDS as DEEDS
from sparsity.stages.context import MASKED as MASKED
from sparsity.stages.context import PENALIZED as PENALIZED
from sparsity.stages.context import SELECTED as SELECTED
from sparsity.stages.context import Context as Context
from sparsity.stages.pruning import prune as prune
from sparsity.stages.quantizing import quantize as quantize
from sparsity.stages.rewinding import rewind as rewind
from sparsity.stages.training import train as train
