"""Networks without what is dead in them, as data: what computes a pruned network's outputs, smaller, in one file."""

from pathlib import Path

from torch import nn

from sparsity import weights
from sparsity.artifact.cutting import Cut, cut
from sparsity.artifact.file import NAME, About, Artifact, is_compact, read, size, write, write_state
from sparsity.artifact.program import Network, Program
from sparsity.artifact.quantizing import Ranges, is_quantized, quantized, with_integers
from sparsity.errors import WeightsError
from sparsity.graph.tape import UnrecordableError

__all__ = [
    "NAME",
    "About",
    "Artifact",
    "Cut",
    "Network",
    "Program",
    "Ranges",
    "UnrecordableError",
    "cut",
    "is_quantized",
    "load",
    "quantized",
    "read",
    "size",
    "with_integers",
    "write",
    "write_state",
]


def load(path: str | Path, module: nn.Module | None = None, *, dense: bool = False) -> nn.Module:
    """The network of a file that a run wrote, in evaluation mode, without its configs and its source.

    Of `compact.safetensors` it is the compact network, or with `dense=True` the one of the first shape, with zeros for
    what went; its `about` says how pixels become images, and the names of the classes. Of `model.safetensors` and
    `stages/*.safetensors` it is the network as the group `model` builds it. `module`: a network of your own, into which
    the weights are read; needed where a file cannot say what computes it. Input: images in [0, 1], normalised where
    the run normalised. Raises a WeightsError of one line.
    """
    path = Path(path)
    if not (path.is_file() and is_compact(path)):
        if dense:
            raise WeightsError(f"path={path} is no compact network, which alone dense=True is for: leave dense out")
        return weights.load(path, module)
    if module is not None:
        return weights.fill(module, read(path, dense=True).state(path), path, key="path").module.eval()
    artifact = read(path, dense=dense)
    if artifact.program is None:
        raise WeightsError(f"path={path} holds weights alone ({artifact.trouble}): give load(path, module=…)")
    network = Network(artifact.program if dense else artifact.program.fused())
    network.about = artifact.about
    return network.eval()
