"""What comes out of sweeps, from result files that are made up here."""

import copy
import csv
import json
import logging
import math
import shlex
import shutil
import statistics
import subprocess
import sys

import hydra
import pytest
from conftest import ROOT, slow
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from sparsity import config, results
from sparsity.errors import ConfigError
from sparsity.results import members, page, pareto, table
from sparsity.results.__main__ import main
from sparsity.results.members import read_sweep
from sparsity.results.points import dominated_volume, front_of, points_of, smallest
from sparsity.results.summaries import read
from sparsity.results.sweeps import summarise

NOTHING = {"validation": None, "test": None}
TOTAL = 266200
RESULT = {
    "format": 2,
    "name": {"model": "lenet300", "reg": "hs", "prune": "std"},
    "stages": ["pretrain", "regularize", "prune", "finetune"],
    "stages_run": [{"name": "finetune", "function": "train", "did": ["selected"], "accuracy": NOTHING, "seconds": 0.5}],
    "seed": 0,
    "accuracy": {"dense": NOTHING, "best": {"test": 0.99, "epoch": 3}, "final": NOTHING},
    "selection": "epoch 2 of finetune, selected by validation accuracy",
    "nonzero": {"weights": 1, "parameters": 1},
    "total": {"weights": TOTAL, "parameters": 266610},
    "compression": {"weights": None, "parameters": None},
    "macs": {"dense": TOTAL, "pruned": 1},
    "structure": "588-140-65",
    "dense_structure": "784-300-100",
    "layers": [{"name": "fc1.weight", "nonzero": 3}],
    "seconds": {"pretrain": 1.5, "total": 2.5},
    "warnings": ["one", "two"],
    "environment": {"device": "cpu"},
    "config": {"seed": 0, "reg": {"decay": 3e-5}, "sensitivity": 0.1, "objectives": ["accuracy", "compression"]},
}


def made(overrides, validation=0.98, test=0.975, compression=20.0, **changes):
    """A result as a run leaves it."""
    result = copy.deepcopy(RESULT)
    settings = dict(override.split("=", 1) for override in overrides)
    nonzero = 0 if compression is None else round(TOTAL / compression)
    result["accuracy"]["final"] = {"validation": validation, "test": test}
    result |= {"overrides": overrides, "seed": int(settings.get("seed", 0))}
    result |= {"nonzero": {"weights": nonzero, "parameters": nonzero}, "macs": {"dense": TOTAL, "pruned": 2 * nonzero}}
    result["compression"] = {"weights": compression, "parameters": compression}
    result["name"] |= {key: settings[key] for key in ("model", "reg") if key in settings}
    return {**result, **changes}


def put(folder, overrides, *arguments, **numbers):
    """A finished member."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(made(overrides, *arguments, **numbers)))
    (folder / "model.safetensors").write_bytes(
        b"the network of " + " ".join(overrides).encode("utf-8", "surrogatepass")
    )
    return folder


def begun(folder, overrides):
    """A member that has begun and has not ended."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    return folder


def failed(folder, overrides, error="the loss became NaN"):
    begun(folder, overrides)
    (folder / "failure.json").write_text(json.dumps({"kind": "DivergedError", "error": error}))
    return folder


def head(folder, **fields):
    """The file that says what a sweep is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "kind": "grid", **fields}))


NUMBERS = [(0.985, 0.983, 10), (0.984, 0.981, 30), (0.980, 0.982, 20), (0.970, 0.969, 90)]  # the third is dominated


@pytest.fixture
def sweep(tmp_path):
    """Twelve members: four decays with three seeds each, whose folders do not sort as words do."""
    root = tmp_path / "sweep"
    for place, (validation, test, compression) in enumerate(NUMBERS):
        for seed, shift in enumerate((0, 0.001, -0.001)):
            overrides = ["model=lenet300", f"reg.decay=1e-{place + 3}", f"seed={seed}"]
            put(root / str(3 * place + seed), overrides, validation + shift, test + shift, compression + seed)
    return root


def rows_of(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- points and front ------------------------------------------------------------------------------------------------


def test_seeds_form_one_point_with_an_interval(sweep):
    point = read([sweep]).points[0]
    numbers = [0.983, 0.984, 0.982]
    mean, interval = point.estimate("accuracy.final.test")
    assert len(point.members) == 3 and mean == pytest.approx(statistics.mean(numbers))
    assert interval == pytest.approx(4.302653 * statistics.stdev(numbers) / math.sqrt(3), rel=1e-6)
    assert point.overrides == ["model=lenet300", "reg.decay=1e-3"]
    assert point.command == "python main.py -m model=lenet300 reg.decay=1e-3 seed=0,1,2"


@pytest.mark.slow
def test_the_front_is_chosen_on_validation_and_ordered_by_compression(sweep):
    summary = summarise([sweep])
    node = json.loads((sweep / "front.json").read_text())
    assert [point["overrides"][1] for point in node["points"]] == ["reg.decay=1e-3", "reg.decay=1e-4", "reg.decay=1e-6"]
    assert node["objectives"][0] == {"name": "accuracy", "direction": "maximize"}
    first = node["points"][0]
    assert first["objectives"] == {"accuracy": pytest.approx(0.985), "compression": pytest.approx(11)}
    assert first["folders"] == ["0", "1", "2"] and first["best_folder"] == "1" and first["seeds"] == [0, 1, 2]
    assert first["accuracy"]["test"]["mean"] == pytest.approx(0.983)
    assert len(summary.front) == 3 and len(summary.points) == 4


def test_other_objectives(sweep):
    front = read([sweep], objectives=["nonzero", "macs"]).front
    assert [point.value("reg.decay") for point in front] == ["1e-6"]
    with pytest.raises(ConfigError, match="accuracy, compression, macs, nonzero, bytes; got 'speed'"):
        read([sweep], objectives=["speed"])


def test_without_an_accuracy_or_a_weight_a_point_is_not_on_the_front(tmp_path):
    put(tmp_path / "0", ["sensitivity=1"], compression=None)
    put(tmp_path / "1", ["sensitivity=2"], validation=None)
    put(tmp_path / "2", ["sensitivity=3"])
    assert [point.value("sensitivity") for point in summarise([tmp_path]).front] == ["3"]


def test_a_run_that_is_repeated_counts_once(tmp_path):
    for folder in ("a/0", "b/0"):
        put(tmp_path / folder, ["sensitivity=0.1", "seed=1"])
    put(tmp_path / "b/1", ["sensitivity=1e-1", "seed=2"])  # the same number, written otherwise
    points = read([tmp_path / "a", tmp_path / "b"], out=tmp_path).points
    assert [len(point.members) for point in points] == [2]


def test_a_setting_that_was_not_given_is_that_of_the_config(tmp_path):
    put(tmp_path / "a", ["reg.decay=3e-05", "seed=0"])
    put(tmp_path / "b", ["seed=1"])
    put(tmp_path / "c", ["reg.decay=1", "seed=0"])
    assert [len(point.members) for point in read([tmp_path]).points] == [2, 1]


def test_settings_without_effect_do_not_part_members(tmp_path):
    put(tmp_path / "0", ["seed=0", "plots=false"])
    put(tmp_path / "1", ["seed=1", "threads=1"])
    summary = read([tmp_path])
    assert len(summary.points) == 1 and summary.swept == ["seed"]


def test_hypervolume_of_points(sweep):
    points = read([sweep]).points[:1]
    nonzero = statistics.mean(round(TOTAL / compression) for compression in (10, 11, 12))
    expected = (0.983 - 0.9) * math.log10(TOTAL / nonzero)
    found = dominated_volume(points, ["accuracy", "compression"], "accuracy.final.test", 0.9)
    assert found == pytest.approx(expected)


@pytest.mark.slow
def test_hypervolumes_as_printed(sweep, capsys):
    put(sweep / "12", ["model=lenet300", "reg.decay=1e-9", "seed=0"], 0.94, 0.999, 60)  # dominated on validation
    assert main([str(sweep), "--objectives", "accuracy,macs"]) == 0
    text = capsys.readouterr().out
    front = read([sweep], objectives=["accuracy", "macs"]).front
    assert {point.value("reg.decay") for point in front} == {"1e-3", "1e-4", "1e-6"}

    def volume(accuracy):
        """Of the steps below the points, from the smallest network on."""
        found, reached = 0.0, 0.9
        for point in sorted(front, key=lambda point: point.mean("macs.pruned")):
            gain = max(point.mean(accuracy) - reached, 0.0)
            found += gain * math.log10(TOTAL / point.mean("macs.pruned"))
            reached += gain
        return found

    volumes = [volume(f"accuracy.final.{part}") for part in ("validation", "test")]
    assert f"{volumes[0]:.4f}" != f"{volumes[1]:.4f}"
    for each in volumes:
        assert f"{each:.4f}" in text


# --- summary.csv -----------------------------------------------------------------------------------------------------


def test_the_summary_has_a_row_a_member_in_the_order_of_jobs(sweep):
    summarise([sweep])
    rows = rows_of(sweep)
    assert [row["folder"] for row in rows] == [str(number) for number in range(12)]
    assert list(rows[0])[:4] == ["reg.decay", "seed", "status", "error"] and list(rows[0])[-1] == "folder"
    assert list(rows[0])[-3:-1] == ["seconds.pretrain", "seconds.total"]
    assert rows[4]["reg.decay"] == "1e-4" and rows[4]["seed"] == "1" and rows[4]["status"] == "done"
    assert float(rows[4]["accuracy.final.test"]) == pytest.approx(0.982)
    assert rows[0]["num_warnings"] == "2" and rows[0]["structure"] == "588-140-65"
    assert not [key for key in rows[0] if key.startswith(("config", "layers", "environment", "format"))]


def test_a_summary_is_the_same_wherever_and_however_a_sweep_ran(tmp_path):
    for place, seconds in (("a", 1.0), ("b/deeper", 2.0)):
        root = tmp_path / place
        put(root / "x=1/0", ["x=1"], seconds={"total": seconds}, computed=["pretrain"] * int(seconds))
        failed(root / "x=2/1", ["x=2"], f"the last good state is in {root}/x=2/1/stages/pretrain.safetensors")
        summarise([root])
    texts = [(tmp_path / place / "summary.csv").read_text() for place in ("a", "b/deeper")]
    assert texts[0].replace("1.0", "2.0") == texts[1]
    assert "state is in stages/pretrain.safetensors" in texts[0] and "computed" not in texts[0]


def test_groups_and_lists_are_swept_keys(tmp_path):
    for place, overrides in enumerate(
        (["reg=hs", "model.factory.hidden=[10]"], ["reg=l1", "model.factory.hidden=[20,5]"])
    ):
        put(tmp_path / str(place), overrides)
    summary = summarise([tmp_path])
    assert summary.swept == ["reg", "model.factory.hidden"]
    assert [row["model.factory.hidden"] for row in rows_of(tmp_path)] == ["[10]", "[20,5]"]
    assert summary.points[1].command == "python main.py reg=l1 'model.factory.hidden=[20,5]'"


def test_keys_that_sweep_json_names_come_first(tmp_path):
    head(tmp_path, swept=["sensitivity"], objectives=["accuracy", "macs"])
    put(tmp_path / "0", ["reg.decay=1", "sensitivity=0.5"])
    put(tmp_path / "1", ["reg.decay=2", "sensitivity=0.5"])
    summary = read([tmp_path])
    assert summary.swept == ["sensitivity", "reg.decay"] and summary.objectives == ["accuracy", "macs"]


def test_several_sweeps_together(sweep, tmp_path, capsys):
    put(tmp_path / "other/0", ["model=lenet300", "reg.decay=1e-3", "seed=3"], 0.985, 0.983, 10)
    put(tmp_path / "other/1", ["model=lenet300", "reg.decay=1e-9", "seed=3"], 0.99, 0.985, 200)
    out = tmp_path / "both"
    assert main([str(sweep), str(tmp_path / "other"), "--out", str(out)]) == 0
    assert [row["sweep"] for row in rows_of(out)] == ["../sweep"] * 12 + ["../other"] * 2
    node = json.loads((out / "front.json").read_text())
    assert [point["folders"] for point in node["points"]] == [["../other/1"]]
    text = capsys.readouterr().out
    assert "all together" in text and "14 members: 14 done" in text
    assert len(read([sweep, tmp_path / "other"]).points[0].members) == 4


# --- interrupted, failed, damaged ------------------------------------------------------------------------------------


def test_results_of_the_first_version_stand_in_the_same_tables(sweep, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(sweep, old)
    for path in old.rglob("result.json"):
        result = json.loads(path.read_text())
        del result["stages_run"]
        selection = "finetuning epoch 2, selected by validation accuracy"
        path.write_text(json.dumps({**result, "format": 1, "selection": selection}))
    new, first = read([sweep]), read([old])
    assert [point.mean("accuracy.final.test") for point in first.front] == [
        point.mean("accuracy.final.test") for point in new.front
    ]
    assert len(first.points) == len(new.points) == 4
    assert summarise([sweep, old], out=tmp_path / "both") is not None
    rows = rows_of(tmp_path / "both")
    assert len(rows) == 24 and {row["status"] for row in rows} == {"done"}
    assert not [key for key in rows[0] if key.startswith(("stages_run", "format"))]


def test_failed_and_unfinished_members_are_counted(sweep, tmp_path, capsys):
    head(sweep, swept=["reg.decay"], total=20)
    failed(sweep / "12", ["reg.decay=9"])
    begun(sweep / "13", ["reg.decay=8"])
    table.show(summarise([sweep]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20 members: 12 done, 1 failed, 7 unfinished"
    assert lines[1].startswith("failed: ") and lines[1].endswith("12: DivergedError: the loss became NaN")
    rows = rows_of(sweep)
    assert [row["status"] for row in rows[11:]] == ["done", "failed", "unfinished"]
    assert rows[12]["error"] == "DivergedError: the loss became NaN" and rows[12]["reg.decay"] == "9"


def test_nothing_finished_is_a_line(tmp_path, capsys):
    failed(tmp_path / "0", ["reg.decay=9"])
    table.show(summarise([tmp_path]))
    assert "no member has finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "front.json").read_text())["points"] == []
    assert len(rows_of(tmp_path)) == 1 and not (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize(
    "text, cause",
    [
        ('{"format": 1, "accur', "is damaged"),
        ("[]", "holds no object"),
        ('{"format": 1}', "lacks accuracy"),
        ('{"format": 7}', "has format 7, and this version reads formats 1 and 2"),
    ],
)
def test_a_damaged_result_is_named_and_left_out(sweep, caplog, text, cause):
    (sweep / "3" / "result.json").write_text(text)
    with caplog.at_level(logging.WARNING, "sparsity"):
        members = read_sweep(sweep).members
    assert [line for line in caplog.messages if cause in line and str(sweep / "3") in line] == caplog.messages
    assert len(caplog.messages) == 1 and members[3].status == "unfinished"
    assert len(points_of(members)[1].members) == 2


def test_a_damaged_sweep_json_is_left_out(sweep, caplog):
    (sweep / "sweep.json").write_text("{")
    assert read([sweep]).swept == ["reg.decay", "seed"] and len(caplog.messages) == 1


def test_single_runs_in_nested_folders(tmp_path):
    put(tmp_path / "2026-01-01/10-00-00", ["sensitivity=1"])
    put(tmp_path / "2026-01-01/9-00-00", ["sensitivity=2"])
    (tmp_path / "2026-01-01/9-00-00/stages").mkdir()
    assert [member.key for member in read_sweep(tmp_path).members] == ["2026-01-01/9-00-00", "2026-01-01/10-00-00"]
    assert len(read_sweep(tmp_path / "2026-01-01/9-00-00").members) == 1


def test_stages_that_came_from_the_store_are_not_counted(tmp_path, capsys):
    put(tmp_path / "0", ["sensitivity=1"], computed=["pretrain", "prune"])
    put(tmp_path / "1", ["sensitivity=2"], computed=["prune"])
    table.show(summarise([tmp_path]))
    assert "stages computed: pretrain 1, regularize 0, prune 2, finetune 0" in capsys.readouterr().out


# --- pictures --------------------------------------------------------------------------------------------------------


def view(folder, color_by=None, published=False, **options):
    return pareto.view_of(read([folder], **options), color_by, published)


def test_the_picture_shows_points_front_and_scale(sweep):
    shown = view(sweep)
    figure = pareto.figure_of(shown)
    axis, bar = figure.axes
    line = axis.get_lines()[0]
    assert line.get_label() == "front, selected on validation"
    assert list(line.get_xdata()) == pytest.approx([11, 31, 91])
    assert list(line.get_ydata()) == pytest.approx([0.983, 0.981, 0.969])
    assert len(axis.collections) - 2 * len(axis.containers) == 4  # points beside their bars, both ways
    assert axis.get_xscale() == "log" and bar.get_ylabel() == "reg.decay" and bar.get_yscale() == "log"
    assert pareto.notes(shown) == ["means over 3 seeds; bars: 95 % intervals of the means"]


def test_the_colour_bar_has_round_numbers(tmp_path):
    for place in range(12):
        put(tmp_path / str(place), [f"reg.decay={1.37e-5 * 1.5**place}"])
    assert pareto.bar_ticks(view(tmp_path).colours) == pytest.approx([2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3])
    bar = pareto.figure_of(view(tmp_path)).axes[1]
    assert [text.get_text() for text in bar.get_yticklabels(minor=True)] == []
    few = pareto.Colours("threads", [3.0, 5.0, 3.0], True)
    assert pareto.bar_ticks(few) == [3, 5]


def test_the_table_shows_the_first_digits_of_numbers(tmp_path, capsys):
    put(tmp_path / "0", ["reg.decay=0.000371581414549848", "reg=hs"])
    put(tmp_path / "1", ["reg.decay=0.5", "reg=l1"])
    table.show(summarise([tmp_path]))
    lines = capsys.readouterr().out.splitlines()
    assert any("0.0003716" in line and " hs " in line for line in lines)
    assert any(line.endswith("python main.py reg.decay=0.000371581414549848 reg=hs") for line in lines)


def test_collapsed_networks_do_not_squeeze_the_others(sweep):
    put(sweep / "12", ["reg.decay=1", "seed=0"], 0.1, 0.0974, 2000)
    shown = view(sweep)
    low, high = pareto.figure_of(shown).axes[0].get_ylim()
    assert 0.9 < low < 0.969 and 0.983 < high < 0.99
    assert "▼: 1 below the axis, down to 9.7 %" in pareto.notes(shown)


def test_other_keys_are_categories_and_other_objectives_other_axes(tmp_path):
    for place, reg in enumerate(("hs", "l1", "hs")):
        put(tmp_path / str(place), [f"reg={reg}", f"sensitivity={place}"], compression=10.0 + place)
    figure = pareto.figure_of(view(tmp_path, objectives=["macs", "accuracy"]))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["front, selected on validation", "reg=hs", "reg=l1"] and len(figure.axes) == 1
    assert "MACs" in figure.axes[0].get_xlabel()
    assert len(pareto.figure_of(view(tmp_path, color_by="sensitivity")).axes) == 2


@pytest.mark.slow
def test_published_results_of_the_same_network(sweep):
    shown = view(sweep, published=True)
    assert {entry.kind for entry in shown.published} == {"element"}
    assert [(entry.x, entry.y) for entry in shown.published if entry.label == "DeepHoyer HS, 2020"] == [
        (54.5, pytest.approx(0.984))
    ]
    numbers = [text.get_text() for text in pareto.figure_of(shown).axes[0].texts]
    assert numbers == [str(number + 1) for number in range(len(shown.published))] and len(numbers) > 10
    assert {entry.kind for entry in view(sweep, published=True, objectives=["accuracy", "macs"]).published} == {
        "structured"
    }
    assert not view(sweep).published


def test_the_page_holds_overrides_folders_and_commands(sweep):
    summarise([sweep])
    text = (sweep / "pareto.html").read_text()
    node = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert node["points"][3]["command"] == "python main.py -m model=lenet300 reg.decay=1e-6 seed=0,1,2"
    points = node["traces"][-1]
    assert points["x"] == pytest.approx([11, 31, 21, 91]) and points["customdata"] == [0, 1, 2, 3]
    assert "reg.decay=1e-6" in points["text"][3] and "10 (best of 3 seeds)" in points["text"][3]
    assert "Plotly" in text and 'src="http' not in text


def test_no_value_ends_the_script_of_the_page(tmp_path):
    put(tmp_path / "0", ["name=</script><b>"])
    text = page.page_of(view(tmp_path), read([tmp_path]))
    assert "</script><b>" not in text and "&lt;/script&gt;" in text.replace("<\\/", "</")


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [{}, {"compression": None}, {"validation": None}])
def test_one_member_has_pictures(tmp_path, numbers):
    put(tmp_path / "0", ["sensitivity=1"], **numbers)
    put(tmp_path / "1", ["sensitivity=2"], **numbers)  # on the same point
    summarise([tmp_path])
    assert (tmp_path / "pareto.png").stat().st_size > 1000 and (tmp_path / "pareto.html").exists()


@pytest.mark.slow
def test_pictures_are_drawn_again_only_where_they_change(sweep):
    def times():
        return [(sweep / name).stat().st_mtime_ns for name in ("pareto.png", "pareto.html")]

    summarise([sweep])
    first = times()
    summarise([sweep])
    assert times() == first
    summarise([sweep], color_by="seed")
    second = times()
    assert all(new > old for new, old in zip(second, first))
    put(sweep / "12", ["model=lenet300", "reg.decay=1", "seed=0"])
    summarise([sweep], color_by="seed")
    assert all(new > old for new, old in zip(times(), second))


def test_a_key_that_no_run_has_cannot_colour(sweep):
    with pytest.raises(ConfigError, match=r"reg\.dekay is no key of the runs: choose of reg.decay, seed"):
        summarise([sweep], color_by="reg.dekay")


# --- choosing and exporting ------------------------------------------------------------------------------------------


def test_the_smallest_that_keeps_an_accuracy_is_chosen_on_validation(sweep):
    points, names = read([sweep]).points, ["accuracy", "compression"]
    chosen = {accuracy: smallest(points, accuracy, names).value("reg.decay") for accuracy in (0.9, 0.982, 0.9845)}
    assert chosen == {0.9: "1e-6", 0.982: "1e-4", 0.9845: "1e-3"}  # 1e-5 has a test accuracy of 0.982, and 0.98 here


def test_a_choice_of_just_the_accuracy_asked_and_by_the_size_asked(tmp_path):
    for place, (validation, compression, macs) in enumerate([(0.99, 10.0, 500), (0.98, 30.0, 900), (0.985, 20.0, 100)]):
        result = {"macs": {"dense": TOTAL, "pruned": macs}}
        put(tmp_path / str(place), [f"reg.decay={place}"], validation, 0.9, compression, **result)
    points = read([tmp_path]).points
    found = [
        smallest(points, 0.98, ["accuracy", name]).value("reg.decay") for name in ("compression", "macs", "nonzero")
    ]
    assert found == ["1", "2", "1"]
    assert smallest(points, 0.99, ["accuracy", "macs"]).value("reg.decay") == "0"


def test_the_seed_that_stands_for_a_point_is_the_best_on_validation(tmp_path):
    for seed, (validation, test) in enumerate([(0.97, 0.99), (0.98, 0.96), (0.98, 0.97)]):
        put(tmp_path / str(seed), ["reg.decay=1", f"seed={seed}"], validation, test)
    assert read([tmp_path]).points[0].best.seed == "1"


@pytest.mark.slow
def test_choosing_and_exporting(sweep, tmp_path, capsys):
    out = tmp_path / "chosen"
    assert main([str(sweep), "--at-least-accuracy", "0.982", "--export", str(out)]) == 0
    text = capsys.readouterr().out
    assert "chosen: validation 98.40% ± 0.25, test 98.10% ± 0.25 (means of 3 seeds), compression 31.0×" in text
    assert "4, seed 1, the best on validation" in text and "seed=0,1,2" in text
    assert (out / "model.safetensors").read_bytes() == b"the network of model=lenet300 reg.decay=1e-4 seed=1"
    assert json.loads((out / "result.json").read_text())["seed"] == 1
    file = tmp_path / "net.safetensors"
    assert main([str(sweep), "--at-least-accuracy", "0.982", "--export", str(file)]) == 0
    assert file.read_bytes() == (out / "model.safetensors").read_bytes() and (tmp_path / "net.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{tmp}/nowhere"], "nowhere is no folder"),
        (["{tmp}/empty"], "holds no runs"),
        (
            ["{sweep}", "--at-least-accuracy", "0.999"],
            "no member reaches --at-least-accuracy 0.999 on validation: the best",
        ),
        (["{sweep}", "--at-least-accuracy", "98"], "--at-least-accuracy must be a share in [0, 1], got 98"),
        (["{sweep}", "--at-least-accuracy", "nan"], "--at-least-accuracy must be a share in [0, 1], got nan"),
        (["{sweep}", "--export", "{tmp}/x"], "--export needs a choice: add --at-least-accuracy"),
        (["{sweep}", "--at-least-accuracy", "0.9", "--export", "{tmp}/empty"], "exists already"),
        (["{sweep}", "--at-least-accuracy", "0.9", "--export", "{tmp}/file/x"], "cannot be written"),
        (["{sweep}", "--at-least-accuracy", "0.9", "--export", "{sweep}/x"], "is inside"),
        (["{sweep}", "--out", "{tmp}/file"], "cannot be written"),
        (["{sweep}", "--color-by", "nothing"], "--color-by nothing is no key"),
        (["{sweep}", "--objectives", "accuracy,accuracy"], "objectives must name each once"),
    ],
)
def test_mistakes_get_one_line_and_status_2(sweep, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    status = main([argument.format(tmp=tmp_path, sweep=sweep) for argument in arguments])
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_network_that_is_gone_is_not_exported(sweep, tmp_path, capsys):
    for folder in sweep.glob("*/model.safetensors"):
        folder.unlink()
    assert main([str(sweep), "--at-least-accuracy", "0.9", "--export", str(tmp_path / "x")]) == 2
    assert "model.safetensors is missing" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_sweeps_for_different_objectives_need_a_choice(sweep, tmp_path):
    head(sweep, objectives=["accuracy", "macs"])
    put(tmp_path / "other/0", ["sensitivity=1"])
    with pytest.raises(ConfigError, match=r"different objectives .accuracy,compression; accuracy,macs.: choose by"):
        read([sweep, tmp_path / "other"])


@pytest.mark.slow
def test_finished_sweeps_are_read_without_torch(sweep):
    code = f"import sys, sparsity.results.__main__ as m; m.main([{str(sweep)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_the_front_of_points_keeps_equal_ones(tmp_path):
    for place in range(2):
        put(tmp_path / str(place), [f"sensitivity={place}"])
    assert len(front_of(read([tmp_path]).points, ["accuracy", "compression"])) == 2


# --- what names hold, and what cannot be drawn ------------------------------------------------------------------------


@pytest.mark.slow
def test_two_seeds_are_shown_as_they_are(tmp_path, capsys):
    for seed, test in enumerate((0.97, 0.98)):
        put(tmp_path / str(seed), ["sensitivity=1", f"seed={seed}"], test, test, 10.0 + seed)
    table.show(summarise([tmp_path]))
    said = capsys.readouterr().out
    assert "97.00, 98.00%" in said and "98.00% ±" not in said
    point = json.loads((tmp_path / "front.json").read_text())["points"][0]["accuracy"]["test"]
    assert point == {"mean": pytest.approx(0.975), "interval": None, "seeds": [0.97, 0.98]}
    shown = view(tmp_path)
    assert shown.spots[0].seeds == [(10.0, 0.97), (11.0, 0.98)] and not shown.spots[0].y_interval
    axis = pareto.figure_of(shown).axes[0]
    assert not axis.containers and axis.get_ylim()[0] < 0.97 and axis.get_ylim()[1] > 0.98
    assert axis.get_xlim()[0] < 10 and axis.get_xlim()[1] > 11
    assert pareto.notes(shown) == ["means over 2 seeds; dots: each of them"]
    node = content_of(page.page_of(shown, read([tmp_path])))
    assert [trace["y"] for trace in node["traces"] if trace["name"] == "each of 2 seeds"] == [[0.97, 0.98]]


def dense(accuracy):
    """The accuracies of a result whose dense network is known."""
    known = {"validation": accuracy, "test": accuracy}
    return {"accuracy": {"dense": known, "final": {"validation": 0.98, "test": 0.975}, "best": {"test": 0.98}}}


def test_the_dense_accuracy_is_a_line(tmp_path):
    for seed, accuracy in enumerate((0.982, 0.984)):
        for decay in ("1", "2"):  # which share the dense network of their seed
            put(tmp_path / f"{decay}-{seed}", [f"reg.decay={decay}", f"seed={seed}"], **dense(accuracy))
    shown = view(tmp_path)
    assert shown.dense == [("dense", pytest.approx(0.983))] and shown.heights[1] > 0.983
    line = next(line for line in pareto.figure_of(shown).axes[0].get_lines() if "dense" in line.get_label())
    assert line.get_label() == "dense, 98.30 %" and line.get_ydata() == pytest.approx([0.983, 0.983])
    shape = content_of(page.page_of(shown, read([tmp_path])))["layout"]["shapes"][0]
    assert shape["y0"] == shape["y1"] == pytest.approx(0.983) and shape["label"]["text"] == "dense, 98.30%"


def test_each_network_has_its_dense_line(tmp_path):
    networks = {("lenet5", "[1]"): 0.99, ("mlp", "[1]"): 0.97, ("mlp", "[2]"): 0.98}
    for place, ((model, hidden), accuracy) in enumerate(networks.items()):
        put(tmp_path / str(place), [f"model={model}", f"model.factory.hidden={hidden}"], **dense(accuracy))
    put(tmp_path / "3", ["model=lenet300"])  # was not trained dense
    found = {entry.label: entry.y for entry in view(tmp_path).dense}
    assert found == {
        f"dense, model={model}, model.factory.hidden={hidden}": pytest.approx(y)
        for (model, hidden), y in networks.items()
    }


def test_bars_are_whole_where_there_is_room(sweep):
    axis = pareto.figure_of(view(sweep)).axes[0]
    spots = view(sweep).spots
    assert axis.get_xlim()[1] > max(spot.x + spot.x_interval for spot in spots)
    assert axis.get_ylim()[0] < min(spot.y - spot.y_interval for spot in spots)


def test_axes_of_accuracy_end_at_100_percent(tmp_path):
    for place in range(3):
        put(tmp_path / str(place), [f"sensitivity={place}"], 1.0, 1.0)
    assert view(tmp_path).heights[1] == 1.0


def content_of(text):
    """What the script of a page reads, as a browser finds it: up to the first end of a script."""
    return json.loads(text.split('type="application/json">')[1].split("</script>")[0])


# a name that ends or begins a script, one that the template stands on, others that HTML, JSON or formulas take amiss
HOSTILE = ["</script><b>", "<!--<script>", "/*PLOTLY*/", "/*CONTENT*/", "'\"&amp;\\", "\u2028$x_{", "\ud800", "网"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HOSTILE[:1], *slow(*HOSTILE[1:])])
def test_the_page_holds_whatever_a_name_does(name, tmp_path):
    for place in range(2):
        put(tmp_path / str(place), [f"name={name}{place}", "seed=0"])
    summarise([tmp_path])
    text = (tmp_path / "pareto.html").read_text(encoding="utf-8")
    node = content_of(text)
    assert [point["overrides"][0] for point in node["points"]] == [f"name={name}0", f"name={name}1"]
    assert text.count("<script") == page.page_of(view(tmp_path), read([tmp_path])).count("<script") == clean_scripts()
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def clean_scripts():
    """How many scripts the page begins, with nothing in it."""
    from plotly.offline import get_plotlyjs

    return (page.TEMPLATE.read_text(encoding="utf-8") + get_plotlyjs()).count("<script")


def test_the_page_can_be_read_where_a_number_is_missing(tmp_path):
    put(tmp_path / "0", ["sensitivity=1"], validation=None)
    assert content_of(page.page_of(view(tmp_path), read([tmp_path])))["points"][0]["objectives"]["accuracy"] is None


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, 1.0])
def test_points_that_are_all_one_are_drawn(compression, tmp_path):
    put(tmp_path / "0", ["sensitivity=1"], 0.98, 0.97, compression)
    summarise([tmp_path])
    assert (tmp_path / "pareto.png").exists() and (tmp_path / "pareto.html").exists()


# --- the line that runs a point again ---------------------------------------------------------------------------------


def words(point):
    """A line as a shell takes it apart, without the program."""
    first, second, *rest = shlex.split(point.command)
    assert (first, second) == ("python", "main.py")
    return rest


SWEPT = [
    "prune.exclude=[fc1],[fc2,fc3]",
    "threads=null,1",
    "data.root='a b','c,d',\"it's\",'$x'",
    "reg.apply_to=[weight],[weight,bias]",
    "data.root=choice('choice(1,2)','glob(*)','[1]')",
    "seed=range(0,3)",
    "reg=glob(*hs)",
    "prune.layers={fc1:0.1},{}",
]


@pytest.mark.slow
@pytest.mark.parametrize("typed", [*SWEPT[:1], *slow(*SWEPT[1:])])
def test_a_line_runs_one_member_and_no_sweep(typed, tmp_path):
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf")):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([typed, "sensitivity=0.5"]), None)
    assert len(jobs) > 1
    for place, job in enumerate(jobs):
        put(tmp_path / str(place) / "0", job)
        (point,) = read([tmp_path / str(place)]).points
        assert not config.swept_keys(words(point)) and config.count_members(words(point)) == 1
        assert config.compose(words(point))[0] == config.compose(job)[0]


def test_a_line_for_several_seeds_runs_these_alone(tmp_path):
    for seed in (3, 5):
        put(tmp_path / str(seed), ["experiment=mine", f"++seed={seed}"], flags=["--config-dir=/a b"])
    (point,) = read([tmp_path]).points
    assert point.command == "python main.py -m '--config-dir=/a b' experiment=mine ++seed=3,5"


def test_a_line_names_the_sweeper_whose_keys_an_experiment_sets(tmp_path):
    for seed in (3, 5):
        put(tmp_path / str(seed), ["experiment=mine", f"seed={seed}"], flags=["hydra/sweeper=search"])
    (point,) = read([tmp_path]).points
    one = "python main.py hydra/sweeper=search experiment=mine seed="
    assert point.command == f"{one}3 && {one}5"


@pytest.mark.parametrize("ends", ["failed", "unfinished"])
def test_members_without_hydras_folder_keep_their_swept_values(ends, tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.begin(folder, ["search=random", "data=digits", f"sensitivity=0.{number + 3}"])
        if ends == "failed":
            results.write_failure(folder, ValueError("no"))
    found = members.read_sweep(tmp_path).members
    assert [member.status for member in found] == [ends] * 2
    assert [member.overrides for member in found] == [("data=digits", f"sensitivity=0.{n}") for n in (3, 4)]
    assert members.swept_keys([members.read_sweep(tmp_path)]) == ["sensitivity"]
    results.begin(folder, ["sensitivity=1"])
    assert members.read_sweep(tmp_path).members[1].status == "unfinished"
