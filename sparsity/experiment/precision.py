"""The precision of the forward pass: `auto` is decided by a measurement, made once on each machine and kept."""

import contextlib
import functools
import hashlib
import json
import logging
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.config import Run
from sparsity.files import cache_folder, write_text

log = logging.getLogger("sparsity")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (128, 800, 512)  # rows, inner and columns of the product that is timed: a batch through a layer
ROUNDS, PRODUCTS = 7, 20
WORTH = 0.75  # of float32's time, below which bfloat16 is taken
CLOSE = 0.02  # the largest error of a product, against its largest entry, that bfloat16 explains


def precision_of(run: Run, device: torch.device) -> str:
    """The precision of a run's forward passes while training: what is asked for, or what `auto` comes to here.

    A GPU stays with float32: the small networks that are trained there gain nothing from less.
    """
    if run.precision != "auto":
        return run.precision
    return _decided() if device.type == "cpu" else "float32"


@functools.lru_cache
def _decided() -> str:
    """What this machine's kept measurement says; the first to measure decides for all that run beside it."""
    machine = {"processor": _processor(), "torch": torch.__version__}
    path = cache_folder() / f"precision-{hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]}.json"
    kept = _read(path)
    if kept is None:
        measured = {**machine, **_measure()}
        log.info(f"precision=auto is {measured['precision']} on this machine, as measured now; kept in {path}")
        kept = _keep(path, measured)
    return kept["precision"]


def _measure() -> dict[str, Any]:
    """Times interleaved products, and looks at whether bfloat16 gives the right ones."""
    rows, inner, columns = SIZES
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    pairs = {name: (left.to(kind), right.to(kind)) for name, kind in PRECISIONS.items()}
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(ROUNDS):
        for name, pair in pairs.items():
            times[name].append(_seconds(*pair))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    exact, rough = ((one @ other).float() for one, other in pairs.values())
    error = float((exact - rough).abs().max() / exact.abs().max())
    is_taken = seconds["bfloat16"] < WORTH * seconds["float32"] and error < CLOSE
    return {"precision": "bfloat16" if is_taken else "float32", "seconds": seconds, "error": error}


def _seconds(left: Tensor, right: Tensor) -> float:
    left @ right  # the first one chooses its kernel
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ right
    return (time.perf_counter() - start) / PRODUCTS


def _processor() -> str:
    """The processor's name and all that it can do, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        told = {line.partition(":")[2].strip() for line in file if line.startswith(("model name", "flags", "Features"))}
        return " | ".join(sorted(told, key=len))
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Any] | None:
    """A kept measurement; None where there is none that can be used."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if kept["precision"] in PRECISIONS else None
    return None


def _keep(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Keeps a measurement, unless another process was first, whose own then holds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read(path) is None:
            path.unlink()  # damaged
        write_text(path, json.dumps(measured, indent=1) + "\n", replace=False)
        return _read(path) or measured
    except OSError as error:
        log.warning(f"warning: {path} cannot be written ({error.strerror or error}): it is measured at every start")
    return measured
