"""The machine: its name, how fast it multiplies matrices, and how fast it passes over memory."""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.floor import FLOAT, Rates
from benchmarks.report import Figure, Report
from benchmarks.subjects import PRECISIONS, Setting

PART = "machine"
# [rows, inner] · [inner, columns]: what the networks' layers multiply at batch 100, forward and for their gradients
OWN_SHAPES = {
    "lenet300 fc1, forward": (100, 784, 300),
    "lenet300 fc1, gradient": (300, 100, 784),
    "lenet300 fc2, forward": (100, 300, 100),
    "lenet5 conv2, forward": (6400, 500, 50),
    "lenet5 conv2, gradient": (50, 6400, 500),
    "lenet5 fc1, forward": (100, 800, 500),
}
SQUARE = {"cpu": 1024, "cuda": 8192}
SIZES = {"cpu": (1 << 20, 1 << 22, 1 << 24, 1 << 28), "cuda": (1 << 22, 1 << 26, 1 << 30)}  # bytes passed over
ONE_ROUND = 0.03  # seconds


def name_of(device: torch.device) -> dict[str, Any]:
    """What a figure has to be read beside."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": psutil.getloadavg()[0],
    }


def processor() -> str:
    """The processor's model, as it names itself."""
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def measure(setting: Setting, report: Report, device: torch.device) -> Rates:
    """The rates of a device, each a figure."""
    report.heading(f"{device.type}: matrix products and passes over memory")
    shapes = {f"square {SQUARE[device.type]}": (SQUARE[device.type],) * 3, **OWN_SHAPES}
    if setting.quick:
        shapes = OWN_SHAPES
    rates = Rates(dict.fromkeys(PRECISIONS, 0.0), {})
    for precision, kind in PRECISIONS.items():
        for name, shape in shapes.items():
            rate = product_rate(shape, kind, device, setting.rounds)
            rates.products[precision] = max(rates.products[precision], rate)
            report.add(Figure(PART, f"{precision} product, {name}", rate / 1e9, "GFLOP/s", details={"shape": shape}))
    for size in SIZES[device.type][: 1 if setting.quick else None]:
        rates.bandwidth[size] = bandwidth(size, device, setting.rounds)
        name = f"a + 2 b over {size / 2**20:g} MB"
        report.add(Figure(PART, name, rates.bandwidth[size] / 1e9, "GB/s", details={"bytes": size}))
    return rates


def product_rate(shape: tuple[int, int, int], kind: torch.dtype, device: torch.device, rounds: int) -> float:
    """The floating-point operations per second of one matrix product."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=kind)
    right = torch.randn(inner, columns, device=device, dtype=kind)
    out = torch.empty(rows, columns, device=device, dtype=kind)
    return 2 * rows * inner * columns / seconds_of(lambda: torch.mm(left, right, out=out), device, rounds)


def bandwidth(num_bytes: int, device: torch.device, rounds: int) -> float:
    """The bytes per second of c = a + 2 b, all three together of the size given."""
    count = num_bytes // FLOAT // 3
    one, other, out = (torch.ones(count, device=device) for _ in range(3))
    return 3 * count * FLOAT / seconds_of(lambda: torch.add(one, other, alpha=2, out=out), device, rounds)


def seconds_of(function: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The seconds of one call, the median of rounds of so many calls that a round can be timed."""
    timed(function, 1, device)
    calls = max(1, round(ONE_ROUND / timed(function, 3, device)))
    return median(timed(function, calls, device) for _ in range(rounds))


def timed(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """The seconds of one of so many calls."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
