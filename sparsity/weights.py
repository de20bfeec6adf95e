"""Weights files: read without executing code, fitted to a module, written whole or not at all."""

import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sparsity import files, models
from sparsity.errors import WeightsError
from sparsity.tensors import Tensors

METADATA_KEY = "sparsity"  # in a safetensors file's metadata: JSON of what rebuilds the module


def read_state(path: str | Path, key: str = "model.weights") -> Tensors:
    """The named tensors of a safetensors file or of a `state_dict` saved by torch; no code in the file is run.

    A `state_dict` may be wrapped in {"state_dict": …}, and its names may all begin with `module.`.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{key}={path} is no file: give a safetensors file or a state_dict saved by torch.save")
    state = _read_safetensors(path, key) if _is_safetensors(path) else _read_torch(path, key)
    state = state if state is not None else {}
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(map(_is_named_tensor, state.items())):
        raise WeightsError(f"{key}={path} holds no state_dict: save one by torch.save(model.state_dict(), …)")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" or path.suffix == ".safetensors"


def _read_safetensors(path: Path, key: str) -> Tensors:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{key}={path} is damaged or cut short ({error}): take another copy") from error


def _read_torch(path: Path, key: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error):
            raise WeightsError(
                f"{key}={path} would execute code when loaded, or holds more than tensors: "
                "save its state_dict by torch.save(model.state_dict(), …) and give that"
            ) from error
        raise WeightsError(f"{key}={path} is damaged or no weights file: take another copy") from error
    except Exception as error:  # the unpickler raises whatever a damaged file makes it trip over
        raise WeightsError(f"{key}={path} is damaged or cut short: take another copy") from error


def fill(module: nn.Module, state: Tensors, source: str | Path, key: str = "model.weights") -> nn.Module:
    """The module with a state written into it; names and shapes must be the module's."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    both = [(name, state[name], own[name]) for name in own if name in state]
    shapes = [
        f"{name} is {list(one.shape)} for {list(other.shape)}" for name, one, other in both if one.shape != other.shape
    ]
    kinds = [
        f"{name} is {one.dtype} for {other.dtype}"
        for name, one, other in both
        if one.is_floating_point() != other.is_floating_point() or one.is_complex()
    ]
    trouble = [
        f"{word}: {_listed(names)}"
        for word, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", shapes),
            ("of another type", kinds),
        )
        if names
    ]
    if trouble:
        raise WeightsError(f"{key}={source} does not fit the model; {'; '.join(trouble)}: choose the model it is of")
    state = OrderedDict(state)
    state._metadata = module.state_dict()._metadata  # the versions that layers wrote it in, as torch hands them on
    module.load_state_dict(state)
    bad = [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise WeightsError(f"{key}={source} holds NaN or infinity in {_listed(bad)}: take another checkpoint")
    return module


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write_state(path: Path, state: Tensors, description: Mapping[str, Any]) -> str:
    """Writes a safetensors file of a state, with a description in its metadata; returns the hash of its bytes."""
    metadata = {METADATA_KEY: json.dumps(description)}  # one entry: several would be written in any order
    content = safetensors.torch.save(state, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def load(path: str | Path, module: nn.Module | None = None) -> nn.Module:
    """The network of a file that a run wrote (`model.safetensors`, `stages/*.safetensors`), in evaluation mode.

    For the factories of the group `model` the file knows how to rebuild it; for a class of your own, give `module`.
    Its input is images in [0, 1], normalised as the file's metadata says where the run normalised.
    """
    state = read_state(path, key="path")
    if module is None:
        module = _rebuild(path)
    return fill(module, state, path, key="path").eval()


def _rebuild(path: str | Path) -> nn.Module:
    described = None
    if _is_safetensors(Path(path)):
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
    if described is None:
        raise WeightsError(f"path={path} does not say which network it is of: give load(path, module=…)")
    package, _, name = described["factory"].pop("_target_").rpartition(".")
    if package != models.__name__ or not callable(getattr(models, name, None)):
        raise WeightsError(f"path={path} is of {package}.{name}, not of this package: give load(path, module=…)")
    factory = getattr(models, name)
    return factory(
        **described["factory"],
        input_shape=tuple(described["input_shape"]),
        num_classes=described["num_classes"],
    )
