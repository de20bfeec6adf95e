"""The benchmarks' own arithmetic, that what they compare computes the same, and that every part of them runs."""

import json
import multiprocessing
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from benchmarks import __main__ as command
from benchmarks import epochs, finetune, mutations, plain, startup, subjects, turns
from benchmarks.floor import Rates, layer_sizes, step_flops, work
from benchmarks.report import Figure, Report, Target

IMAGE = (1, 28, 28)
SETTING = subjects.Setting("", 200, 1, True, True, "cpu", ("lenet300",))


class Enough(Exception):
    """No more readings are wanted."""


def readings(count, function, *arguments):
    """So many readings of a contender, in this process."""
    found = []

    def tell(**reading):
        found.append(reading)
        if len(found) == count:
            raise Enough

    with pytest.raises(Enough):
        function(tell, *arguments)
    return found


def counting(tell, start):
    for number in range(start, start + 3):
        tell(seconds=float(number))


def test_floating_point_operations_of_lenet300():
    macs = [784 * 300, 300 * 100, 100 * 10]
    assert [size for size, _ in layer_sizes(subjects.module("lenet300"), IMAGE)] == macs and sum(macs) == 266_200
    forward, weights, inputs = 2 * 266_200 * 100, 2 * 266_200 * 100, 2 * (266_200 - 235_200) * 100
    assert step_flops(macs, 100) == forward + weights + inputs == 112_680_000


def test_floating_point_operations_of_lenet5():
    macs = [20 * 25 * 24**2, 50 * 20 * 25 * 8**2, 800 * 500, 500 * 10]
    sizes = layer_sizes(subjects.module("lenet5"), IMAGE)
    assert [size for size, _ in sizes] == macs and sum(macs) == 2_293_000
    assert [units for _, units in sizes] == [20 * 24**2, 50 * 8**2, 500, 10]


def test_bytes_of_lenet300():
    parameters, units, inputs = 266_610, 100 * 410, 100 * 784
    for penalised in (False, True):
        done = work(subjects.module("lenet300"), IMAGE, 100, penalised=penalised)
        assert done.passed == 4 * ((8 + penalised) * parameters + 4 * units + inputs)
    assert done.held == 4 * (4 * parameters + units + inputs)


def test_floor_is_the_sum_of_products_and_passes():
    done = work(subjects.module("lenet300"), IMAGE, 100, penalised=False)
    rates = Rates({"float32": 1e11, "bfloat16": 4e11}, {2**20: 1e12, 2**22: 1e10, 2**28: 1e9})
    products, passes = 112_680_000 / 1e11, done.passed / 1e10  # 4.5 MB are held: nearest to 4 MB
    assert done.floor(rates, "float32") == pytest.approx(products + passes)
    assert done.larger(rates, "float32") == max(products, passes)
    assert done.floor(rates, "bfloat16") == pytest.approx(products / 4 + passes)
    assert done.floor(rates, "float32", members=64) == pytest.approx(64 * (products + done.passed / 1e9))


@pytest.mark.parametrize("network", subjects.NETWORKS)
@pytest.mark.parametrize("reg", ["hs", "group_hs"])
def test_the_plain_loop_minimises_the_same(network, reg):
    ours = subjects.module(network)
    theirs = plain.PlainLeNet300() if network == "lenet300" else plain.PlainLeNet5()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(3, *IMAGE)
    torch.testing.assert_close(theirs(images), ours(images))
    members = subjects.stack([ours])
    penalty = subjects.penalty(reg, members).function({name: p[0] for name, p in members.parameters.items()})
    torch.testing.assert_close(plain.plain_penalty(reg, theirs), penalty, rtol=1e-5, atol=0)


def test_targets():
    assert Target(6, at_least=True).is_reached(6.0) and not Target(6, at_least=True).is_reached(5.9)
    assert Target(2).is_reached(2.0) and not Target(2).is_reached(2.1)
    figure = Figure("part", "name", 3.0, "s", ratio=5.0, target=Target(4, at_least=True), floor=1.5)
    assert figure.is_reached and figure.times_floor == 2.0
    assert figure.line().split() == ["name", "3", "s", "5.00×", "≥", "4", "reached", "2.0×", "floor"]
    assert Figure("part", "name", 3.0, "s").is_reached is None


def test_figures_are_written_as_they_come(tmp_path, capsys):
    report = Report(tmp_path / "folder" / "bench.json", {"processor": "fast"})
    for count in (1, 2):
        report.add(Figure("part", f"figure {count}", 3.0, "s", target=Target(2)))
        written = json.loads(report.path.read_text())
        assert written["machine"] == {"processor": "fast"} and len(written["figures"]) == count
    assert written["figures"][1]["reached"] is False and "NOT reached" in capsys.readouterr().out
    assert report.summary().startswith("0 of 2 targets reached\n  part: figure 1")


def test_medians_of_turns():
    taken = object.__new__(turns.Turns)
    taken.first = {"plain": {"seconds": 9.0}, "ours": {"seconds": 5.0}}
    taken.rounds = [{"plain": {"seconds": p}, "ours": {"seconds": o}} for p, o in ((8.0, 1.0), (6.0, 2.0), (9.0, 3.0))]
    assert taken.median("plain") == 8.0 and taken.median("ours") == 2.0
    assert taken.ratio("plain", "ours") == 3.0  # of 8, 3 and 3; not 8 / 2
    assert taken.one_off("ours") == 3.0


@pytest.mark.slow
def test_plain_epochs():
    assert all(reading["seconds"] > 0 for reading in readings(2, plain.plain_epochs, SETTING, "lenet300", "hs"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "members"), [("eager", 1), ("recorded", 1), ("recorded", 2)])
def test_our_epochs(way, members):
    found = readings(2, subjects.our_epochs, SETTING, "lenet300", "hs", way, "float32", members)
    assert all(reading["seconds"] > 0 and "bytes" in reading for reading in found)


@pytest.mark.slow
def test_finetuning_what_is_left(tmp_path):
    file = str(tmp_path / "pruned.pt")
    (prepared,) = readings(1, finetune.prepare, SETTING, "lenet300", "hs", file)
    assert prepared["share_left"] == pytest.approx(0.02, abs=1e-4) and prepared["live"]["fc3.weight"][1] <= 10
    left = finetune.work_left("lenet300", prepared["live"], weights=5324)
    (_, few), (one, other), (last, _) = prepared["live"].values()
    inputs, hidden = prepared["live"]["fc1.weight"][0] * few, one * other + last * prepared["live"]["fc3.weight"][1]
    assert left.flops == 2 * 100 * (2 * inputs + 3 * hidden)
    for function, more in ((finetune.train_dense, ()), (finetune.finetune, (file,))):
        found = readings(2, function, SETTING, "lenet300", "recorded", "float32", *more)
        assert all(reading["seconds"] > 0 for reading in found)


def test_measured_images_keep_the_proportions_of_the_whole():
    splits = subjects.splits(replace(SETTING, images=240), validated=True)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [220, 20, 40]
    assert subjects.splits(SETTING).validation is None
    assert SETTING.per_epoch(2.0) == 600.0 and SETTING.steps == 2


def test_a_command_is_timed_until_it_ends():
    assert 0.1 < startup.until_mark(["-c", "import time; time.sleep(0.1)"]) < 5.0


@pytest.mark.slow
def test_contenders_have_their_turns():
    taken = turns.Turns({"one": (counting, 1), "other": (counting, 10)}, rounds=2)
    assert taken.first == {"one": {"seconds": 1.0}, "other": {"seconds": 10.0}}
    assert taken.all("one") == [2.0, 3.0] and taken.all("other") == [11.0, 12.0]
    with pytest.raises(RuntimeError, match="ended early"):
        turns.Turns({"one": (counting, 1)}, rounds=3)


class Beside(turns.Contender):
    """A contender in a thread, which has nothing to import."""

    def __init__(self, function, *arguments):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = threading.Thread(target=turns._serve, args=(theirs, function, arguments), daemon=True)
        self.process.start()


@pytest.mark.slow
def test_every_part_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    for module in (turns, epochs, finetune):
        monkeypatch.setattr(module, "Contender", Beside)
    given = ["--quick", "--random", "--images=600", "--rounds=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *given])
    command.main()
    said = capsys.readouterr().out
    figures = json.loads(out.read_text())["figures"]
    assert {figure["part"] for figure in figures} == {
        "machine", "agreement", "epochs", "finetune", "methods", "populations", "recipes", "compact", "startup"
    }  # fmt: skip
    steps = {figure["name"]: figure["value"] for figure in figures if figure["part"] == "startup"}
    assert steps["first training step"] > steps["import torch"] > 0
    for figure in figures:
        assert figure["name"] in said


@pytest.mark.slow
def test_what_only_a_gpu_shows_runs_where_there_is_none(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--random", "--images=600", "--rounds=1", f"--out={out}"]
    done = subprocess.run([*command, "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--quick --device cpu" in done.stderr
    command += ["--quick", "--device=cpu", "--networks=lenet300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert {figure["part"] for figure in figures.values()} == {"gpu"}
    same = [figure for name, figure in figures.items() if name.endswith("entries that differ")]
    assert len(same) == 3 and all(figure["reached"] for figure in same)
    assert all(figure["reached"] for name, figure in figures.items() if "and alone" in name)


def test_mutations_change_one_thing_in_one_line():
    drawn = list(mutations.candidates(random.Random(3)))
    assert [each.after for each in drawn] == [each.after for each in mutations.candidates(random.Random(3))]
    for each in drawn:
        lines = (ROOT / mutations.KERNELS / each.file).read_text().splitlines()
        assert lines[each.line - 1] == each.before != each.after and "\n" not in each.after
        assert each.before.partition("//")[2] == each.after.partition("//")[2]
    assert {each.kind for each in drawn} == {"operator", "number", "truth", "ternary", "statement"}


@pytest.mark.parametrize(("line", "after"), [
    ("  x = a + 1;  // + 2", ["  x = a - 1;  // + 2", "  x = a + 2;  // + 2", "  ;  // + 2"]),
    ("#if LANES < 3", []),
    ("  return y > 0 ? one : true;", ["  return y >= 0 ? one : true;", "  return y > 1 ? one : true;",
                                      "  return y > 0 ? one : false;", "  return y > 0 ? true : one;"]),
])  # fmt: skip
def test_the_changes_of_a_line(line, after):
    assert [found for _, found in mutations.changes(line)] == after
