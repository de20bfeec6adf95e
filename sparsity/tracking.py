"""Follows runs in other programs: every epoch's numbers, the config, the result and its pictures.

A tracker is a function of what there is to say of a run before it begins; it gives what is told the rest. It changes no
number: one that fails is left out, and the run goes on.
"""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sparsity.errors import reason
from sparsity.nodes import Track
from sparsity.training import Epoch

log = logging.getLogger("sparsity")

ROW = {"loss": "loss", "penalty": "penalty", "objective": "objective", "lr": "lr", "seconds": "seconds"}
ROW |= {"validation": "accuracy/validation", "test": "accuracy/test"}  # of an epoch: by what name it is told
FIGURES = ("accuracy", "compression", "nonzero", "macs")  # of a result


@dataclass(frozen=True)
class About:
    """What there is to say of a run before it begins."""

    name: str
    group: str | None  # the sweep that it is a member of
    folder: Path  # its own
    config: Mapping[str, Any]  # resolved, as YAML has it


class Tracker(Protocol):
    """What is told of one run."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers after so many epochs of the whole run."""

    def end(self, figures: Mapping[str, float], files: Sequence[Path], failure: str | None) -> None:
        """The run is over: its figures, its files, and why it failed if it did."""


def tensorboard(about: About, *, folder: str) -> Tracker:
    """Event files in a folder below the run's own, for `tensorboard --logdir outputs`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(about.folder / folder))
    writer.add_text("config", f"```json\n{json.dumps(about.config, indent=1, default=str)}\n```")
    return _TensorBoard(writer)


class _TensorBoard:
    def __init__(self, writer: Any):
        self.writer, self.last = writer, 0

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.last = step
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def end(self, figures: Mapping[str, float], files: Sequence[Path], failure: str | None) -> None:
        from matplotlib.image import imread

        for name, number in figures.items():
            self.writer.add_scalar(f"result/{name}", number, self.last)
        for path in files:
            if path.suffix == ".png":
                self.writer.add_image(path.stem, imread(path)[..., :3], self.last, dataformats="HWC")
            elif path.suffix == ".json":
                self.writer.add_text(path.stem, f"```json\n{path.read_text()}\n```", self.last)
        if failure is not None:
            self.writer.add_text("failure", failure, self.last)
        self.writer.close()


def mlflow(about: About, *, uri: str, artifacts: str, experiment: str) -> Tracker:
    """A run of MLflow's; those of a sweep are an experiment of their own, in place of the one that is named.

    uri: of the tracking store, such as sqlite:///FILE or http://…; artifacts: the folder of files, of a local store.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    is_local = uri.startswith("sqlite:///")
    if is_local:
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    client, name = MlflowClient(tracking_uri=uri), about.group or experiment
    place = Path(artifacts).absolute().as_uri() if is_local else None
    try:
        number = client.create_experiment(name, artifact_location=place)
    except MlflowException:  # it is there
        number = client.get_experiment_by_name(name).experiment_id
    run = client.create_run(number, run_name=about.name, tags={"folder": str(about.folder)}).info.run_id
    settings = [Param(key, str(value)[:MOST_LETTERS]) for key, value in _flat(about.config)]
    for start in range(0, len(settings), MOST_PARAMETERS):
        client.log_batch(run, params=settings[start : start + MOST_PARAMETERS])
    return _MLflow(client, run)


MOST_LETTERS, MOST_PARAMETERS = 6000, 100  # of a parameter, and of a call, that MLflow takes


class _MLflow:
    def __init__(self, client: Any, run: str):
        self.client, self.run, self.last = client, run, 0

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        self.last, now = step, int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, each, now, step) for name, each in numbers.items()])

    def end(self, figures: Mapping[str, float], files: Sequence[Path], failure: str | None) -> None:
        self.log(self.last, {f"result/{name}": number for name, number in figures.items()})
        for path in files:
            self.client.log_artifact(self.run, str(path))
        if failure is not None:
            self.client.set_tag(self.run, "failure", failure)
        self.client.set_terminated(self.run, "FINISHED" if failure is None else "FAILED")


def wandb(
    about: About, *, project: str, mode: Literal["online", "offline", "disabled"], folder: str, entity: str | None
) -> Tracker:
    """A run of Weights & Biases', in the group of its sweep; offline it lies in a folder, for `wandb sync`."""
    import wandb as library

    Path(folder).mkdir(parents=True, exist_ok=True)
    own = {"project": project, "entity": entity, "group": about.group, "name": about.name}
    settings = library.Settings(silent=True, console="off")
    config = dict(about.config)
    run = library.init(**own, dir=folder, mode=mode, config=config, settings=settings, reinit="create_new")
    return _WeightsAndBiases(run)


class _WeightsAndBiases:
    def __init__(self, run: Any):
        self.run = run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def end(self, figures: Mapping[str, float], files: Sequence[Path], failure: str | None) -> None:
        from wandb import Artifact, Image

        self.run.log({path.stem: Image(str(path)) for path in files if path.suffix == ".png"})
        self.run.summary.update({f"result/{name}": number for name, number in figures.items()})
        kept = Artifact(f"run-{self.run.id}", "run")
        for path in files:
            kept.add_file(str(path))
        self.run.log_artifact(kept)
        if failure is not None:
            self.run.summary["failure"] = failure
        self.run.finish(exit_code=0 if failure is None else 1)


# --- all trackers of a run -------------------------------------------------------------------------------------------


class Following:
    """Remembers the trackers of one run, and what they were told; they are opened when there is something to tell."""

    def __init__(self, tracks: Mapping[str, Track], about: About):
        self.tracks, self.about = dict(tracks), about
        self.trackers: dict[str, Tracker] | None = None
        self.told: dict[str, int] = {}  # the last epoch of each stage, in order

    def epoch(self, stage: str, row: Epoch, member: int = 0) -> None:
        """Tells one epoch of a stage, unless it was told before; member: whose numbers of the row."""
        if not self.tracks or row.epoch <= self.told.get(stage, -1):
            return
        before = sum(epochs for name, epochs in self.told.items() if name != stage)
        self.told[stage] = row.epoch
        numbers = {name: getattr(row, key) for key, name in ROW.items()}
        found = {name: each[member] if isinstance(each, list) else each for name, each in numbers.items()}
        known = {name: each for name, each in found.items() if each is not None and math.isfinite(each)}
        self._tell("log", before + row.epoch, {**known, "stage": len(self.told)})

    def end(self, result: Mapping[str, Any] | None, failure: str | None = None) -> None:
        """Tells what the run came to."""
        if not self.tracks:
            return
        own = {key: (result or {}).get(key) for key in FIGURES}
        figures = {key.replace(".", "/"): each for key, each in _flat(own) if _is_number(each)}
        found = sorted(path for path in self.about.folder.iterdir() if path.suffix in (".png", ".json", ".csv"))
        config = self.about.folder / ".hydra" / "config.yaml"
        self._tell("end", figures, [*found, *([config] if config.is_file() else [])], failure)

    def _tell(self, what: str, *arguments: Any) -> None:
        if self.trackers is None:
            self.trackers = {}
            for name, track in self.tracks.items():
                self.trackers[name] = self._tried(name, lambda track=track: track.function.partial()(self.about))
        for name, tracker in self.trackers.items():
            if tracker is not None:
                self._tried(name, lambda tracker=tracker: getattr(tracker, what)(*arguments))

    def _tried(self, name: str, call: Any) -> Any:
        """What a call gives; a tracker that fails is left out from then on, and said to be."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call()
        except Exception as error:  # whatever these programs may raise
            log.warning(f"warning: track={name} fails, and is left out: {reason(error)}")
            self.trackers[name] = None
            return None


def _flat(node: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested maps, by dotted keys."""
    if isinstance(node, Mapping) and node:
        for name, inner in node.items():
            yield from _flat(inner, f"{before}.{name}" if before else str(name))
    else:
        yield before, node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
