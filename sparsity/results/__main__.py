"""The summary, the front and the pictures of finished sweeps: `python -m sparsity.results --help`."""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsity.errors import USER_MISTAKE, ConfigError, SparsityError
from sparsity.files import file_digest, whole
from sparsity.front import OBJECTIVES
from sparsity.results import table
from sparsity.results.members import RESULT, MemberFolder
from sparsity.results.points import Point, smallest
from sparsity.results.summaries import Summary
from sparsity.results.sweeps import summarise
from sparsity.streams import be_lenient, say

REFERENCE_ACCURACY = 0.9
COMPARED = Path("outputs/compared")
NETWORK, COMPACT = "model.safetensors", "compact.safetensors"
PROBE, PREDICT = "sensitivity", "predict"
SHARES = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,0.98,0.99"


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    found = argparse.ArgumentParser(
        prog="python -m sparsity.results",
        description="Summarises sweeps that were run, also interrupted ones and folders of single runs: writes "
        "summary.csv, front.json, pareto.png and pareto.html, and shows the front.",
        epilog="The front and a choice go by validation accuracy; test accuracy is reported beside it. "
        f"{PROBE} RUN prunes each layer of one run alone, {PREDICT} FILE IMAGE… names the classes of images: "
        f"{PROBE} --help, {PREDICT} --help.",
    )
    found.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, or any folder of runs")
    found.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"where the files go (default: into the sweep; of several sweeps into {COMPARED})",
    )
    found.add_argument("--objectives", metavar="A,B", help=f"of {', '.join(OBJECTIVES)} (default: the sweep's own)")
    found.add_argument(
        "--color-by",
        metavar="KEY",
        help="the key that colours the points, such as reg.decay (default: the first that was swept)",
    )
    found.add_argument("--published", action="store_true", help="draw published results of the same network behind")
    found.add_argument(
        "--reference-accuracy",
        type=float,
        default=REFERENCE_ACCURACY,
        metavar="SHARE",
        help="where the hypervolume begins; its other corner is the dense network (default: %(default)s)",
    )
    found.add_argument(
        "--at-least-accuracy",
        type=float,
        metavar="SHARE",
        help="name the smallest network that keeps "
        "this validation accuracy (of several seeds, their mean), such as 0.984",
    )
    found.add_argument(
        "--export",
        type=Path,
        metavar="PATH",
        help=f"copy that network out: into the new folder PATH as "
        f"{NETWORK}, {COMPACT} and {RESULT}, or as the new file PATH where it ends in .safetensors",
    )
    found.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help=f"a module outside this package that the exported run's model or data is of, for {COMPACT}",
    )
    return found


def parser_of_probe() -> argparse.ArgumentParser:
    """What the command line takes that prunes each layer alone."""
    found = argparse.ArgumentParser(
        prog=f"python -m sparsity.results {PROBE}",
        description="Prunes each layer of a finished run's network alone, the smallest weights first (of a run that "
        "prunes filters or other units, these), and measures accuracy on validation without training: a table, "
        f"{PROBE}.csv and {PROBE}.png.",
    )
    found.add_argument("folder", type=Path, metavar="RUN", help="the folder of a finished run")
    found.add_argument(
        "--shares",
        metavar="A,B,…",
        default=SHARES,
        help="of a layer that are pruned, each in [0, 1] (default: %(default)s)",
    )
    found.add_argument(
        "--stage",
        metavar="NAME",
        help="the stage whose network it is (default: the last before the first that prunes, else the final network)",
    )
    found.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: into RUN)")
    found.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module outside this package that the run's model, data or unit is of",
    )
    return found


def parser_of_predictions() -> argparse.ArgumentParser:
    """What the command line takes that names the classes of images."""
    found = argparse.ArgumentParser(
        prog=f"python -m sparsity.results {PREDICT}",
        description="Names the most likely classes of images, with their shares, by a compact network.",
    )
    found.add_argument("network", type=Path, metavar="FILE", help="compact.safetensors of a run, or the run's folder")
    found.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    found.add_argument("--classes", type=int, default=3, metavar="N", help="so many for each image (%(default)s)")
    return found


def predictions(arguments: argparse.Namespace) -> None:
    """Names the classes of images."""
    if arguments.classes < 1:
        raise ConfigError(f"--classes must be 1 or more, got {arguments.classes}")
    from sparsity.data.picture import EXTENSIONS
    from sparsity.results.predicting import predict, show

    network = arguments.network / COMPACT if arguments.network.is_dir() else arguments.network
    images = []
    for path in arguments.images:
        inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in EXTENSIONS) if path.is_dir() else []
        if path.is_dir() and not inside:
            raise ConfigError(f"{path} holds no images: give image files, or folders of them")
        images += inside or [path]
    show(predict(network, images, arguments.classes))


def probe(arguments: argparse.Namespace) -> None:
    """Prunes each layer of a run alone."""
    shares = _shares(arguments.shares)
    from sparsity.experiment.probing import sensitivity
    from sparsity.results.sensitivity import show, write

    found = sensitivity(arguments.folder, shares, stage=arguments.stage, trust=arguments.trust)
    show(found)
    write(found, arguments.out or arguments.folder)


def _shares(text: str) -> list[float]:
    """Shares as they are typed, rising, each once."""
    found = set()
    for entry in text.split(","):
        try:
            share = float(entry)
        except ValueError:
            share = float("nan")
        if not 0 <= share <= 1:
            raise ConfigError(f"--shares must be shares in [0, 1], such as 0.5,0.9,0.99, got {entry.strip() or text!r}")
        found.add(share)
    return sorted(found)


def _asks_for(word: str, arguments: Sequence[str]) -> bool:
    """Whether a command line begins with a command's word; a sweep of that name stands alone, or is ./ of it."""
    return list(arguments[:1]) == [word] and (len(arguments) > 1 or not Path(word).is_dir())


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    _check(arguments)
    out = arguments.out or (COMPARED if len(set(arguments.folders)) > 1 else None)
    names = arguments.objectives and arguments.objectives.split(",")
    summary = summarise(
        arguments.folders, out=out, objectives=names, color_by=arguments.color_by, published=arguments.published
    )
    if not summary.members:
        raise ConfigError(f"{', '.join(map(str, arguments.folders))} holds no runs: no {RESULT} is below it")
    table.show(summary)
    if summary.points:
        table.show_volumes(summary, arguments.reference_accuracy)
    if arguments.at_least_accuracy is not None:
        _choose(summary, arguments)


def _check(arguments: argparse.Namespace) -> None:
    """What can be found wrong before anything is read."""
    if arguments.export and arguments.at_least_accuracy is None:
        raise ConfigError("--export needs a choice: add --at-least-accuracy, such as --at-least-accuracy 0.984")
    for name in ("at_least_accuracy", "reference_accuracy"):
        share = getattr(arguments, name)
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be a share in [0, 1], got {share:g}: 98.4 % is 0.984")


def _choose(summary: Summary, arguments: argparse.Namespace) -> None:
    point = smallest(summary.points, arguments.at_least_accuracy, summary.objectives)
    table.show_choice(point)
    if arguments.export:
        export(point, arguments.export, [sweep.folder for sweep in summary.sweeps])
        say(f"exported to {arguments.export}")
        if not arguments.export.suffix and not (arguments.export / COMPACT).exists():
            _export_compact(point.best.folder, arguments)


def export(point: Point, path: Path, sweeps: Sequence[Path] = ()) -> None:
    """Copies the network of a point, of several seeds the best on validation, and its result to a new place."""
    copies = _copies(point.best, path)
    for source, target in copies.items():
        if not source.is_file():
            raise ConfigError(f"{source} is missing: there is no network to export")
        about = (point.best.result or {}).get("files", {}).get(source.name)
        if about is not None and about["sha256"] != file_digest(source):
            raise ConfigError(f"{source} is damaged: it is not what {RESULT} says; the sweep's command makes it again")
        if target.exists():
            raise ConfigError(f"--export {path}: {target} exists already: name another place or remove it")
    for sweep in sweeps:
        if sweep.resolve() in path.resolve().parents:
            raise ConfigError(f"--export {path} is inside {sweep}, where it would count as a run: name a place outside")
    try:
        _copy(copies)
    except OSError as error:
        raise ConfigError(f"--export {path} cannot be written: {error.strerror or error}") from error


def _export_compact(folder: Path, arguments: argparse.Namespace) -> None:
    """The compact network of a point beside its network, made of the run's config and data."""
    from sparsity.experiment.compacting import export_compact
    from sparsity.results import card

    try:
        found = export_compact(folder, arguments.export, arguments.trust)
    except SparsityError as error:
        say(f"warning: without {COMPACT}: {error}")
        return
    for line in found.lines:
        say(f"warning: {line}")
    card.show(found.card, found.latency)


def _copies(member: MemberFolder, path: Path) -> dict[Path, Path]:
    """Which file goes where."""
    network, result = member.folder / NETWORK, member.folder / RESULT
    if path.suffix == Path(NETWORK).suffix:
        return {network: path, result: path.with_suffix(".json")}
    if path.exists():
        raise ConfigError(f"--export {path} exists already: name another place or remove it")
    compact = {member.folder / COMPACT: path / COMPACT} if (member.folder / COMPACT).exists() else {}
    return {network: path / NETWORK, result: path / RESULT, **compact}


def _copy(copies: dict[Path, Path]) -> None:
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as temporary:
            shutil.copyfile(source, temporary)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 for a user's mistake, which is told in one line."""
    be_lenient()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if _asks_for(PROBE, arguments):
            probe(parser_of_probe().parse_args(arguments[1:]))
        elif _asks_for(PREDICT, arguments):
            predictions(parser_of_predictions().parse_args(arguments[1:]))
        else:
            run(parser().parse_args(arguments))
    except SparsityError as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
