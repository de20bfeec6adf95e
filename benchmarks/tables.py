"""What methods come to at equal training time: `python -m benchmarks.tables --data-root FOLDER`.

Every importance with the global cut, every regularizer with the std rule, and every recipe, each leaving a tenth, a
thirtieth and a hundredth of the weights, over some seeds. A row is one sweep in outputs/tables/, which resumes where it
was stopped; the tables are written again after each. What follows the options is typed to each sweep, such as
`hydra/launcher=population` on a GPU.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.subjects import NETWORKS

ROOT = Path(__file__).parent.parent
COMPRESSIONS = (10, 30, 100)
IMPORTANCES = ["magnitude", "taylor", "taylor_squared", "snip", "grasp", "brain_damage", "wanda", "synflow", "random"]
REGULARIZERS = ["none", "l1", "hoyer", "hs", "transformed_l1", "group_lasso", "sized_lasso", "group_hs"]
REGULARIZERS += ["proximal_l1", "proximal_lasso", "p_decay"]
FACTORS = (0.1, 0.3, 1, 3, 10)  # of a regularizer's own decay; validation chooses
EPOCHS = 40  # of the standard recipe, and of every row: other recipes' stages are lengthened to as many


def lengths(recipe: str, epochs: int) -> list[str]:
    """What makes a recipe's stages take so many epochs together."""
    return [f"schedule.{stage}.epochs={epochs // 8 * eighths}" for stage, eighths in LENGTHS[recipe].items()]


LENGTHS = {  # in eighths of all epochs; what is repeated takes so many each time
    "standard": {"pretrain": 2, "regularize": 4, "finetune": 2},
    "adapted": {"pretrain": 2, "regularize": 4, "finetune": 2},
    "iterative": {"pretrain": 2, "regularize": 2, "finetune": 1},
    "lottery": {"pretrain": 2},
    "gradual": {"pretrain": 2, "regularize": 6},
    "at_init": {"pretrain": 8},
    "rigl": {"pretrain": 8},
    "set": {"pretrain": 8},
    "magnitude": {"pretrain": 2, "finetune": 6},
}
ROUNDS = {"iterative": 2, "lottery": 3}


@dataclass(frozen=True)
class Row:
    """One row of a table: a method, and the sweep of it."""

    table: str
    method: str
    overrides: list[str]


def rows(epochs: int = EPOCHS) -> Iterator[Row]:
    """All rows of a network's tables."""
    for name in IMPORTANCES:
        rule = ["prune=percentile", "prune/cut=global", f"prune/importance={name}"]
        yield Row("importance", name, ["recipe=magnitude", *lengths("magnitude", epochs), *rule])
    for name in REGULARIZERS:
        own = yaml.safe_load((ROOT / f"conf/reg/{name}.yaml").read_text())["decay"]
        decays = ",".join(f"{own * factor:g}" for factor in FACTORS)
        chosen = [f"reg.decay={decays}"] if own else []
        yield Row("reg", name, [f"reg={name}", "prune=std", *chosen, *lengths("standard", epochs)])
    for name in LENGTHS:
        rounds = [f"rounds={ROUNDS[name]}"] if name in ROUNDS else []
        yield Row("recipe", name, [f"recipe={name}", *rounds, *lengths(name, epochs)])


TABLES = tuple(dict.fromkeys(row.table for row in rows()))


def main() -> None:
    """Runs the sweeps asked for, and prints the tables of all that there are."""
    parser = argparse.ArgumentParser("benchmarks.tables", description=__doc__.splitlines()[0])
    root = os.environ.get("SPARSITY_DATA", "data")
    parser.add_argument("--data-root", default=root, help=f"folder that holds MNIST ({root})")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="%(default)s")
    parser.add_argument("--tables", default=",".join(TABLES), help="%(default)s")
    parser.add_argument("--rows", default="", help="some rows alone, such as taylor,random")
    parser.add_argument("--seeds", default="0,1,2", help="%(default)s")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each row, a multiple of 8 (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="sweeps at a time, which share the machine")
    parser.add_argument("--out", type=Path, default=Path("outputs/tables"), help="%(default)s")
    asked, typed = parser.parse_known_args()
    if asked.epochs < 8 or asked.epochs % 8:
        parser.error(f"--epochs {asked.epochs}: a multiple of 8, so that recipes share it out")
    wanted = [
        (network, row)
        for network in asked.networks.split(",")
        for row in rows(asked.epochs)
        if row.table in asked.tables.split(",") and row.method in (asked.rows or row.method).split(",")
    ]
    out = asked.out.resolve()
    environment = {**os.environ, "SPARSITY_DATA": str(Path(asked.data_root).resolve())}

    def run(network: str, row: Row) -> int:
        folder = out / network / row.table / row.method
        budget = f"budget.compression={','.join(map(str, COMPRESSIONS))}"
        given = [f"model={network}", *row.overrides, budget, "plots=false", f"seed={asked.seeds}"]
        given += [f"hydra.sweep.dir={folder}", *typed]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "ab") as log:
            command = [sys.executable, "main.py", "-m", *given]
            status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        (out / "tables.md").write_text(tables(out))
        outcome = f"see {log.name}" if status.returncode else "done"
        print(f"{network} {row.table} {row.method}: {outcome}", flush=True)
        return status.returncode

    with ThreadPoolExecutor(asked.jobs) as pool:
        failed = sum(status != 0 for status in pool.map(lambda each: run(*each), wanted))
    print(tables(out))
    sys.exit(failed > 0)


def tables(folder: Path) -> str:
    """The tables of all sweeps in a folder, in Markdown: test accuracy of the selected epoch, mean ± deviation."""
    parts = []
    for network in NETWORKS:
        for table in TABLES:
            lines = [
                line
                for row in rows()
                if row.table == table and (line := row_of(folder / network / table / row.method, row.method))
            ]
            head = f"| {network}: `{table}` | " + " | ".join(f"{each}×" for each in COMPRESSIONS) + " |"
            if lines:
                parts.append("\n".join([head, "|---" * (len(COMPRESSIONS) + 1) + "|", *lines]))
    return "\n\n".join(parts) + "\n"


def row_of(folder: Path, method: str) -> str | None:
    """One row: at each compression the setting that is best on validation, in mean over the seeds."""
    summary = folder / "summary.csv"
    if not summary.exists():
        return None
    with open(summary) as file:
        members = list(csv.DictReader(file))
    found: dict[int, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for member in members:
        if member.get("accuracy.selected.test"):
            accuracy = float(member["accuracy.selected.validation"]), float(member["accuracy.selected.test"])
            found[int(member["budget.compression"])][member.get("reg.decay", "")].append(accuracy)
    cells = [cell(found[each], len({member["seed"] for member in members})) for each in COMPRESSIONS]
    return f"| {method} | " + " | ".join(cells) + " |"


def cell(settings: dict[str, list[tuple[float, float]]], num_seeds: int) -> str:
    """Mean ± standard deviation over the seeds of the setting that validation prefers; — of none."""
    if not settings:
        return "—"
    decay, best = max(settings.items(), key=lambda each: statistics.mean(accuracy for accuracy, _ in each[1]))
    tests = [100 * accuracy for _, accuracy in best]
    deviation = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
    few = f" of {len(tests)} seeds" if len(tests) < num_seeds else ""
    return f"{statistics.mean(tests):.2f}{deviation}{few}" + (f" ({float(decay):g})" if decay else "")


if __name__ == "__main__":
    main()
