"""What sweeps came to: their members, points and front, as pictures, tables and pages take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsity.results.members import MemberFolder, SweepFolder, chosen_objectives, read_sweep, swept_keys
from sparsity.results.points import Point, front_of, points_of


@dataclass(frozen=True)
class Summary:
    """What one sweep or several together came to."""

    sweeps: list[SweepFolder]
    out: Path  # where the files are
    objectives: list[str]
    swept: list[str]
    points: list[Point]
    front: list[Point]

    @property
    def members(self) -> list[MemberFolder]:
        """The members of all sweeps."""
        return [member for sweep in self.sweeps for member in sweep.members]


def read(
    folders: Sequence[Path | str], *, out: Path | str | None = None, objectives: Sequence[str] | None = None
) -> Summary:
    """The sweeps in `folders`, their points and their front; writes nothing."""
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    sweeps = [read_sweep(path) for path in paths]
    names = chosen_objectives(sweeps, objectives)
    points = points_of(member for sweep in sweeps for member in sweep.members)
    target = paths[0] if out is None else Path(out)
    return Summary(sweeps, target, names, swept_keys(sweeps), points, front_of(points, names))
