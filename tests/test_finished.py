"""Finished runs: checked before they are trusted, set aside where they are damaged, made again, never lost."""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from sparsity import experiment, files
from sparsity.errors import ConfigError
from sparsity.experiment.folder import finished
from sparsity.results.__main__ import export
from sparsity.results.sealed import is_finished, read_result, sealed
from sparsity.results.summaries import read
from sparsity.results.sweeps import summary_csv

SMALL = ("model=mlp", "model.factory.hidden=[4]", "plots=false", "stages=[pretrain]", "schedule.pretrain.epochs=1")
SAME = ("accuracy", "nonzero", "layers", "keys", "files", "warnings", "computed_with")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run and the store that holds its stage; to be copied."""
    import sparsity

    root = tmp_path_factory.mktemp("made")
    sparsity.run([*SMALL, "data=digits", "schedule=smoke", f"store={root}/store", f"hydra.run.dir={root}/run"])
    return root


@pytest.fixture
def folder(made, run, tmp_path):
    """A finished run in a folder of its own, and what runs it again."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)

    def again(*overrides):
        return run(*SMALL, f"store={tmp_path}/store", f"hydra.run.dir={tmp_path}/run", *overrides)

    return tmp_path / "run", again


def text_of(path, change):
    path.write_text(change(path.read_text()))


def without(*names):
    def change(text):
        return json.dumps({key: value for key, value in json.loads(text).items() if key not in names})

    return change


def in_its_place(make):
    def change(path):
        path.unlink()
        make(path)

    return change


DAMAGE = {
    "one digit": lambda path: text_of(path, lambda text: text.replace('"total": 3', '"total": 9', 1)),
    "cut short": lambda path: text_of(path, lambda text: text[:500]),
    "emptied": lambda path: path.write_text(""),
    "another program's": lambda path: path.write_text('{"hello": 1}'),
    "a list": lambda path: path.write_text("[1, 2]"),
    "other kinds": lambda path: path.write_text('{"format": 1, "accuracy": [], "keys": 3}'),
    "nested deep": lambda path: path.write_text('{"a":' * 100_000),
    "a long number": lambda path: path.write_text('{"format": ' + "9" * 5_000 + "}"),
    "a large number": lambda path: path.write_text('{"format": 1e999}'),
    "no number": lambda path: path.write_text('{"format": NaN}'),
    "of zeros": lambda path: path.write_bytes(bytes(1000)),
    "in another encoding": lambda path: path.write_text('{"name": "é"}', encoding="utf-16"),
    "another format": lambda path: text_of(path, lambda text: text.replace('"format": 2', '"format": 0')),
    "a folder": in_its_place(os.mkdir),
    "a pipe": in_its_place(os.mkfifo),
    "a link to nothing": in_its_place(lambda path: os.symlink("nothing", path)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_result_is_set_aside(name, folder, caplog):
    place, _ = folder
    result = json.loads((place / "result.json").read_text())
    assert finished(place, result["keys"], ()) == {**result, "folder": str(place)}
    DAMAGE[name](place / "result.json")
    assert not is_finished(place) and finished(place, result["keys"], ()) is None
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "set aside as result.json.damaged, and the run is made again" in warnings[0]
    assert os.path.lexists(place / "result.json.damaged") and not os.path.lexists(place / "result.json")


def test_what_was_set_aside_is_made_again_from_the_store(folder):
    place, again = folder
    before = json.loads((place / "result.json").read_text())
    (place / "result.json").write_text("")
    result = again()
    assert {key: result[key] for key in SAME} == {key: before[key] for key in SAME} and result["computed"] == []
    assert is_finished(place) and again() == result


@pytest.mark.parametrize("file", ["model.safetensors", "stages/pretrain.safetensors"])
@pytest.mark.parametrize("damage", ["cut short", "one bit", "missing", "a folder"])
def test_a_damaged_network_is_noticed_and_made_again(file, damage, folder, caplog):
    place, again = folder
    keys = json.loads((place / "result.json").read_text())["keys"]
    whole = (place / file).read_bytes()
    if damage in ("cut short", "one bit"):
        (place / file).write_bytes(whole[:-4] if damage == "cut short" else whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (place / file).unlink()
    assert is_finished(place) == (damage == "one bit")
    if damage == "a folder":
        (place / file).mkdir()
        with pytest.raises(ConfigError, match="cannot be written"):
            again()
    else:
        assert finished(place, keys, ()) is None
    assert f"says of {file} what is not in it" in caplog.text


def test_what_cannot_be_set_aside_is_one_line(folder, monkeypatch):
    place, again = folder
    (place / "result.json").write_text("")
    monkeypatch.setattr(files, "set_aside", lambda path: None)
    with pytest.raises(ConfigError, match=r"result.json is damaged: .* cannot be set aside: remove it"):
        again()


def test_a_result_without_checksum_is_read_and_made_again_where_it_is_the_same_run(folder, caplog):
    place, again = folder
    text_of(place / "result.json", without("checksum", "files", "computed_with"))
    (place / "result.json").write_text(
        json.dumps({**json.loads((place / "result.json").read_text()), "keys": {"pretrain": "of the first version"}})
    )
    assert read_result(place / "result.json")["nonzero"]["weights"] > 0 and not is_finished(place)
    with pytest.raises(ConfigError, match="holds a finished run of other settings"):
        again("seed=1")
    again("threads=1")
    assert "has no checksum: it is set aside" in caplog.text and is_finished(place)


def of_first_version(place):
    """Leaves the result as the first version of the program wrote it: sealed, and without a record a stage."""
    result = json.loads((place / "result.json").read_text())
    own = {key: value for key, value in result.items() if key not in ("checksum", "stages_run")}
    new = ("rounds", "rewind_to", "ramp", "budget", "recipe")
    own["config"] = {key: value for key, value in own["config"].items() if key not in new}
    old = sealed({**own, "format": 1, "keys": {"pretrain": "of the first version"}})
    (place / "result.json").write_text(json.dumps(old))
    return old


def test_a_run_does_not_resume_from_a_result_of_the_first_version(folder, caplog):
    place, again = folder
    old = of_first_version(place)
    assert read_result(place / "result.json") == old and not is_finished(place)
    with pytest.raises(ConfigError, match="holds a finished run of other settings"):
        again("seed=1")
    assert json.loads((place / "result.json").read_text()) == old
    result = again("threads=1")
    assert "has format 1, and runs resume from format 2 alone: it is set aside" in caplog.text
    assert result["format"] == 2 and result["stages_run"] and is_finished(place)
    assert result["nonzero"] == old["nonzero"] and result["computed"] == []


def test_tables_read_results_of_the_first_version(folder, caplog):
    place, _ = folder
    sweep = place.parent / "sweep"
    shutil.copytree(place, sweep / "0")
    shutil.copytree(place, sweep / "1")
    old = of_first_version(sweep / "1")
    summary = read([sweep])
    (point,) = summary.points  # both are of the same settings
    assert [member.error for member in summary.members] == [None, None] and not caplog.messages
    assert point.mean("accuracy.final.test") == old["accuracy"]["final"]["test"]


@pytest.mark.slow
def test_a_run_whose_rewinding_names_an_epoch_is_found_finished(run, tmp_path):
    how = (*SMALL[:3], "recipe=lottery", "rounds=1", "rewind_to=pretrain@1", "prune=percentile", "sensitivity=0.5")
    how += (f"hydra.run.dir={tmp_path}/lottery", f"store={tmp_path}/store")
    first = run(*how)
    assert set(first["keys"]) == {*first["stages"], "pretrain@1"} and first["keys"]["pretrain@1"]
    assert run(*how) == first
    with pytest.raises(ConfigError, match="holds a finished run of other settings"):
        run(*how, "rewind_to=pretrain@2")


def test_a_finished_run_of_other_keys_is_never_written_over(folder):
    place, again = folder
    before = (place / "result.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a finished run of other settings, data or code"):
        again("seed=1")
    assert (place / "result.json").read_bytes() == before


def test_a_checksum_is_of_what_is_read_back():
    result = sealed({"a": [1, float("nan"), (2.5, {3: Path("x")})], "b": float("inf")})
    assert result["a"] == [1, None, [2.5, {"3": "x"}]] and result["b"] is None
    assert sealed(json.loads(json.dumps(result)) | {"checksum": None})["checksum"] == result["checksum"]
    assert sealed({"a": 1})["checksum"] != sealed({"a": 1.5})["checksum"]


# --- order, interruptions, races -------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process, wherever it is."""


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_a_checked_run_or_one_that_is_made_again(folder, monkeypatch):
    place, again = folder
    shutil.rmtree(place)
    shutil.rmtree(place.parent / "store")
    names, replace = [], os.replace

    def killed_at(number):
        def replaced(source, target):
            names.append(os.path.basename(target))
            if len(names) == number:
                raise Killed
            replace(source, target)

        return replaced

    for number in range(1, 20):
        names.clear()
        monkeypatch.setattr(os, "replace", killed_at(number))
        with contextlib.suppress(Killed):
            result = again()
            break
        assert not is_finished(place)
    assert number > 5 and names[-1] == "result.json" and is_finished(place)
    assert again()["checksum"] == result["checksum"]


@pytest.mark.parametrize("plots", ["plots=false", pytest.param("plots=true", marks=pytest.mark.slow)])
def test_the_result_is_written_last_and_after_all_is_on_the_disk(plots, folder, monkeypatch):
    place, again = folder
    (place / "result.json").unlink()
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("flushed"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append(os.path.basename(paths[1])), replace(*paths)))
    again(plots)
    assert events[-3:] == ["flushed", "flushed", "result.json"]  # its bytes, its folder
    for name in ("layers.csv", "history.csv", *(("density.png", "curves.png") if plots == "plots=true" else ())):
        assert events[events.index(name) - 2] == "flushed"


def test_what_another_process_finishes_meanwhile_is_taken(folder, monkeypatch):
    place, again = folder
    shutil.rmtree(place)
    record = experiment._record

    def meanwhile(*parts):
        monkeypatch.setattr(experiment, "_record", record)
        again()
        text_of(place / "history.csv", lambda text: text + "theirs")
        return record(*parts)

    monkeypatch.setattr(experiment, "_record", meanwhile)
    assert again()["nonzero"]["weights"] > 0
    assert (place / "history.csv").read_text().endswith("theirs")


def test_one_process_waits_for_another_that_runs_the_same(folder, caplog):
    place, again = folder
    (place / "result.json").rename(place / "result")
    finish = threading.Event()

    def other():
        with files.claimed(place / ".lock", waits=lambda: None, is_done=lambda: True):
            finish.wait(30)
            (place / "result").rename(place / "result.json")

    thread = threading.Thread(target=other)
    thread.start()
    while not (place / ".lock").exists():
        time.sleep(0.01)

    def end_when_it_waits(record):
        if "waits" in record.getMessage():
            finish.set()
        return True

    logger = logging.getLogger("sparsity")
    logger.addFilter(end_when_it_waits)
    with caplog.at_level("INFO"):
        result = again()
    logger.removeFilter(end_when_it_waits)
    thread.join()
    assert "waits for another process that runs the same" in caplog.text and result["files"]
    assert sorted(path.name for path in place.iterdir()) == [
        *("compact.safetensors", "history.csv", "layers.csv", "model.safetensors", "result.json", "stages")
    ]


# --- reading sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGE)
def test_tables_leave_a_damaged_member_out_in_a_line(name, folder, caplog):
    place, _ = folder
    shutil.copytree(place, place / "sweep" / "0")
    shutil.copytree(place / "sweep" / "0", place / "sweep" / "1")
    DAMAGE[name](place / "sweep" / "1" / "result.json")
    summary = read([place / "sweep"])
    assert len(summary.points) == 1 and summary_csv(summary).count("damaged") <= 1
    assert [member.error is None for member in summary.members] == [True, False]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "the member is left out" in warnings[0] and "\n" not in warnings[0]


def test_a_damaged_network_is_not_exported(folder, tmp_path):
    place, _ = folder
    (point,) = read([place]).points
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged: it is not what result.json says"):
        export(point, tmp_path / "exported")
    (place / "model.safetensors").write_bytes(whole)
    export(point, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == whole
