"""Runs that are followed in other programs: all that is told, once, and never a number or a run lost."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
from conftest import compose, slow
from omegaconf import open_dict
from test_processes import waits

from sparsity import config, tracking
from sparsity.errors import ConfigError
from sparsity.nodes import Call, Track
from sparsity.tracking import About, Following
from sparsity.training import Epoch

PROGRAMS = ["tensorboard", "mlflow", "wandb"]


class Told:
    """A tracker that remembers, and fails where it is to."""

    def __init__(self, about, fails=()):
        self.about, self.fails, self.steps, self.ended = about, fails, [], []

    def log(self, step, numbers):
        if "log" in self.fails:
            raise OSError("the server is away")
        self.steps.append((step, numbers))

    def end(self, *given):
        self.ended.append(given)


def following(folder, fails=(), group=None):
    opened = []

    def function(about):
        opened.append(Told(about, fails))
        if "open" in fails:
            raise OSError("the server is away")
        return opened[-1]

    track = Track(Call("track.told.function", "told", function, {}), "json")
    return Following({"told": track}, About("run", group, Path(folder), {"a": {"b": 1}})), opened


def row(epoch, *validation, loss=0.5):
    return Epoch(epoch, [loss] * 2, [0.0] * 2, [loss] * 2, list(validation), None, 0.1, 1.0)


def test_epochs_are_on_one_axis_and_told_once(tmp_path):
    found, opened = following(tmp_path)
    assert not opened, "opened before there is anything to tell"
    for stage, epochs in (("pretrain", (1, 2)), ("finetune", (0, 1))):
        for epoch in epochs:
            found.epoch(stage, row(epoch, 0.1 * epoch, 0.2 * epoch), member=1)
            found.epoch(stage, row(epoch, 9.0, 9.0), member=1)  # as when it is read from the store
    (tracker,) = opened
    assert [step for step, _ in tracker.steps] == [1, 2, 2, 3]
    last = tracker.steps[-1][1]
    assert last["accuracy/validation"] == 0.2 and last["stage"] == 2 and last["lr"] == 0.1
    assert "accuracy/test" not in last


def test_what_is_no_number_is_left_out(tmp_path):
    found, (opened) = following(tmp_path)
    found.epoch("pretrain", row(1, float("nan"), loss=float("inf")))
    assert opened[0].steps[0][1].keys() == {"penalty", "lr", "seconds", "stage"}


@pytest.mark.parametrize("fails", ["log", "open"])
def test_a_tracker_that_fails_is_left_out_and_said_once(fails, tmp_path, caplog):
    found, opened = following(tmp_path, fails=[fails])
    with caplog.at_level(logging.WARNING, logger="sparsity"):
        for epoch in (1, 2, 3):
            found.epoch("pretrain", row(epoch, 0.5))
        found.end({"accuracy": {"final": {"test": 0.5}}})
    assert caplog.text.count("track=told fails, and is left out: the server is away") == 1
    assert not opened[0].ended


def test_the_end_tells_figures_and_files(tmp_path):
    found, opened = following(tmp_path)
    for name in ("result.json", "curves.png", "history.csv", "model.safetensors"):
        (tmp_path / name).touch()
    found.end({"accuracy": {"final": {"test": 0.5, "validation": None}}, "compression": {"weights": 20.0}, "seed": 3})
    figures, files, failure = opened[0].ended[0]
    assert figures == {"accuracy/final/test": 0.5, "compression/weights": 20.0} and failure is None
    assert [path.name for path in files] == ["curves.png", "history.csv", "result.json"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_package_that_is_missing_is_one_line_before_anything_trains(name, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else there(module))
    composed, _ = config.compose([f"track={name}"])
    with pytest.raises(ConfigError, match=rf"track={name} needs the package {name}: pip install -e '\.\[{name}\]'"):
        config.read(composed)


@pytest.mark.slow
def test_several_at_once_and_unknown_ones():
    composed, _ = config.compose(["track=[tensorboard,mlflow]", "track.mlflow.function.experiment=mine"])
    found = config.read(composed).track.others
    assert list(found) == ["tensorboard", "mlflow"] and found["mlflow"].function.numbers["experiment"] == "mine"
    assert not config.read(compose([])[0]).track.others
    with pytest.raises(ConfigError, match=r"nope is no choice: .*track has mlflow, none, tensorboard, wandb"):
        config.compose(["track=[nope,mlflow]"])


@pytest.mark.slow
def test_what_follows_a_run_changes_no_key_and_no_number(run, tmp_path):
    small = ("stages=[pretrain]", f"store={tmp_path / 'store'}")
    plain, tracked = run(*small), run(*small, "track=tensorboard", "track.tensorboard.function.folder=events")
    assert plain["keys"] == tracked["keys"] and tracked["computed"] == []
    assert plain["accuracy"] == tracked["accuracy"]
    assert list((Path(tracked["folder"]) / "events").iterdir())


@pytest.mark.slow
def test_what_follows_a_sweep_names_no_other():
    def name(*typed):
        composed, own = config.compose(list(typed))
        with open_dict(composed):
            composed.hydra = own
            composed.hydra.overrides.task = ["seed=0,1", *typed]
        return config.sweep_name(composed)

    assert name() == name("track=tensorboard") == name("track=mlflow", "track.mlflow.function.experiment=other")
    assert name() != name("seed=5")


# --- as these programs read it ---------------------------------------------------------------------------------------


def told(name, tmp_path):
    """A tracker of the program itself, told of two epochs, a picture and a result."""
    from PIL import Image

    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "curves.png")
    (folder / "result.json").write_text(json.dumps({"seed": 1}))
    about = About("a", "runs", folder, {"reg": {"decay": 0.5, "apply_to": ["weight"]}, "seed": 1})
    numbers = {
        "tensorboard": {"folder": "events"},
        "mlflow": {"uri": f"sqlite:///{tmp_path}/m.db", "artifacts": f"{tmp_path}/artifacts", "experiment": "single"},
        "wandb": {"project": "p", "mode": "offline", "folder": f"{tmp_path}/wandb", "entity": None},
    }[name]
    tracker = getattr(tracking, name)(about, **numbers)
    tracker.log(1, {"loss": 0.75, "accuracy/validation": 0.25})
    tracker.log(2, {"loss": 0.5, "accuracy/validation": 0.5})
    tracker.end({"accuracy/final/test": 0.5}, sorted(folder.glob("*.*")), None)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = told("tensorboard", tmp_path)
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    assert events.Scalars("result/accuracy/final/test")[0].value == 0.5
    assert events.Tags()["images"] == ["curves"] and "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_mlflow_reads_it(tmp_path):
    told("mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/m.db")
    (run,) = client.search_runs([client.get_experiment_by_name("runs").experiment_id])
    assert run.info.run_name == "a" and run.info.status == "FINISHED"
    assert run.data.params["reg.decay"] == "0.5" and run.data.metrics["result/accuracy/final/test"] == 0.5
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 0.75),
        (2, 0.5),
    ]
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"curves.png", "result.json"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_keeps_it_offline(tmp_path):
    told("wandb", tmp_path)
    (log,) = (tmp_path / "wandb").rglob("run-*.wandb")
    words = (b"accuracy/validation", b"result/accuracy/final/test", b"apply_to", b"curves")
    assert waits(lambda: all(word in log.read_bytes() for word in words))  # its own process writes it


@pytest.mark.slow
@pytest.mark.parametrize("name", [*slow("tensorboard")])
def test_each_member_of_a_population_is_followed(name, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from test_main import main

    small = ("data=digits", "schedule=smoke", "model=mlp", "model.factory.hidden=[8]", "threads=1", f"track={name}")
    where = (f"hydra.sweep.dir={tmp_path / 'sweep'}", f"store={tmp_path / 'store'}")
    done = main("-m", *small, *where, "reg.decay=1e-5,1e-2", "hydra/launcher=population")
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr
    last = []
    for member in (0, 1):
        events = EventAccumulator(str(tmp_path / "sweep" / str(member) / "tensorboard"))
        events.Reload()
        steps = [each.step for each in events.Scalars("accuracy/validation")]
        assert steps == sorted(steps) and steps[-1] == 6  # two epochs each of three stages
        assert events.Scalars("result/compression/weights")
        last.append(events.Scalars("accuracy/validation")[-1].value)
    results = [json.loads((tmp_path / "sweep" / str(each) / "result.json").read_text()) for each in (0, 1)]
    assert last == pytest.approx([each["accuracy"]["last"]["validation"] for each in results], abs=1e-6)
    again = main("-m", *small, *where[1:], f"hydra.sweep.dir={tmp_path / 'other'}", "reg.decay=1e-5,1e-2")
    assert again.returncode == 0
    events = EventAccumulator(str(tmp_path / "other" / "1" / "tensorboard"))  # all from the store, told all the same
    events.Reload()
    assert [each.step for each in events.Scalars("accuracy/validation")] == steps
