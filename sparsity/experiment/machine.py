"""The device of a run, and the process as training wants it."""

import contextlib
from collections.abc import Iterator

import torch

from sparsity.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend refuses in its own way
        there = ["auto", "cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConfigError(f"device={name} is not there: this machine has {', '.join(there)}") from error
    if device.type == "meta":
        raise ConfigError("device=meta computes nothing: take auto or cpu")
    return device


@contextlib.contextmanager
def machine(threads: int | None) -> Iterator[None]:
    """The process as training wants it: denormals flushed (sparsity training makes many), threads as asked.

    A GPU's convolutions give the same numbers at every run, and float32 is no shorter there.
    """
    cudnn = torch.backends.cudnn
    before, deterministic, allow_tf32 = torch.get_num_threads(), cudnn.deterministic, cudnn.allow_tf32
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or before)
    cudnn.deterministic, cudnn.allow_tf32 = True, False
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
        cudnn.deterministic, cudnn.allow_tf32 = deterministic, allow_tf32
