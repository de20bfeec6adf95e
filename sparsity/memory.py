"""How much memory is free: of a GPU, or of the machine within the limits of the container that the process is in."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    import torch

GROUPS = Path("/sys/fs/cgroup")  # where Linux shows its control groups
OWN_GROUPS = Path("/proc/self/cgroup")  # which of them this process is in


class Version(NamedTuple):
    """Where a version of the control groups tells limits, what is used, and what of it can be taken back."""

    limits: tuple[str, ...]
    used: str
    inactive: str  # in memory.stat: pages of files that were read and that nobody needs at once


VERSIONS = (
    Version(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: "torch.device | None" = None) -> int:
    """The bytes that may still be taken on a device; of a CPU the least that the machine and its control groups leave.

    A control group leaves its limit less what it uses, and those around it limit it too.
    """
    if device is not None and device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return max(0, min([psutil.virtual_memory().available, *_left_by_groups()]))


def _left_by_groups() -> Iterator[int]:
    for folder in _own_groups():
        for version in VERSIONS:
            limits = [limit for limit in (_number(folder / name) for name in version.limits) if limit is not None]
            if limits:
                used, inactive = _number(folder / version.used) or 0, _inactive(folder, version)
                yield min(limits) - max(0, used - inactive)


def _own_groups() -> Iterator[Path]:
    """The folders of the groups that limit this process: its own, those around it, and what a container sees."""
    yield from (GROUPS, GROUPS / "memory", GROUPS / "unified")
    for line in _text(OWN_GROUPS).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        roots = (GROUPS / "memory",) if "memory" in controllers.split(",") else (GROUPS, GROUPS / "unified")
        inside = Path(path.strip("/"))
        if (not controllers or "memory" in controllers.split(",")) and ".." not in inside.parts:
            yield from (root / each for root in roots for each in (inside, *inside.parents))


def _inactive(folder: Path, version: Version) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, number = line.partition(" ")
        if name == version.inactive and number.strip().isdigit():
            return int(number)
    return 0


def _number(path: Path) -> int | None:
    """The number that a file holds; None where there is no file, or no limit."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    return ""
