"""Where to prune: each layer of a finished run alone, and the densities of layers on the way."""

import csv
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsity.errors import ConfigError
from sparsity.results import sensitivity as shown
from sparsity.results.__main__ import PROBE, _asks_for, _shares, main
from sparsity.results.sensitivity import Curve, Sensitivity

SHARES = [0.0, 0.5, 0.9]


def found(*accuracies, unit="entry", whole=()):
    curves = [Curve(f"layer{index}.weight", 100, SHARES, list(each)) for index, each in enumerate(accuracies)]
    return Sensitivity("after pretrain", "validation", unit, 0.9, SHARES, curves, list(whole), "a, $b")


@pytest.mark.parametrize(
    ("accuracies", "safe"),
    [((0.9, 0.89, 0.5), 0.5), ((0.9, 0.95, 0.9), 0.9), ((0.9, 0.5, 0.9), 0.0), ((0.8, 0.9, 0.9), None)],
)
def test_a_share_is_harmless_where_all_smaller_ones_are(accuracies, safe):
    assert shown.safe_share(found(accuracies).curves[0], found(accuracies)) == safe


def test_what_has_no_room_in_the_table_is_every_other_share(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    many = found((0.9, 0.5, 0.1), whole=["last.weight"])
    curve = Curve("some.long.name.of.a.layer.weight", 1234, SHARES * 3, [0.9, 0.5, 0.125] * 3)
    shown.show(Sensitivity(**{**vars(many), "shares": [each / 10 for each in range(1, 10)], "curves": [curve]}))
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 65 and "90%" in said[2] and "80%" not in said[2]
    assert "12.50%" in said[4] and said[-1] == "none of them may go: last"


def test_shares_are_read_in_order_and_once():
    assert _shares("0.9, 0.5,0.9,1,0") == [0, 0.5, 0.9, 1]
    for text in ("", "1.01", "-0.1", "nan", "a,0.5", "50%"):
        with pytest.raises(ConfigError, match=r"--shares must be shares in \[0, 1\]"):
            _shares(text)


def test_a_sweep_of_that_name_is_summarised_as_before(tmp_path):
    assert _asks_for(PROBE, ["sensitivity", "run"]) and _asks_for(PROBE, ["sensitivity"])
    assert not _asks_for(PROBE, ["run", "sensitivity"]) and not _asks_for(PROBE, ["./sensitivity"])
    (tmp_path / "sensitivity").mkdir()  # the test's folder is the current one
    assert not _asks_for(PROBE, ["sensitivity"]) and _asks_for(PROBE, ["sensitivity", "run"])


def test_the_picture_has_a_line_for_each_layer_and_one_of_the_whole_network(monkeypatch):
    monkeypatch.setattr(shown, "save", lambda figure, path: figures.append(figure))
    figures = []
    shown.draw(Path(), found((0.9, 0.8, 0.5), (0.9, 0.9, 0.7)))
    whole, first, second = figures[0].axes[0].get_lines()
    assert list(whole.get_ydata()) == [0.9, 0.9]
    assert list(first.get_xdata()) == SHARES and list(second.get_ydata()) == [0.9, 0.9, 0.7]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["after pretrain", "layer0", "layer1"]
    assert [text.get_text() for text in figures[0].axes[0].get_xticklabels()] == ["90 %", "50 %", "0 %"]


# --- of a finished run -----------------------------------------------------------------------------------------------

SMALL = (
    "model=mlp",
    "model.factory.hidden=[12]",
    "schedule.pretrain.epochs=2",
    "stages=[pretrain,prune]",
    "plots=false",
)


@functools.cache
def held_out():
    from sparsity import config
    from sparsity.experiment.loading import load_data

    splits, _ = load_data(config.read(config.compose(["data=digits"])[0]))
    (batch,) = splits.validation.batches(torch.arange(len(splits.validation))[None], len(splits.validation))
    return splits.scale(batch.images)[0], batch.labels[0]


def accuracy_of(folder, stage, change):
    """The validation accuracy of a stage's network with one of its tensors changed, without our own ways to do it."""
    import sparsity

    network = sparsity.load(folder / "stages" / f"{stage}.safetensors")
    images, labels = held_out()
    with torch.no_grad():
        change(network)
        return (network(images).argmax(1) == labels).double().mean().item()


def rows_of(folder):
    with (folder / "sensitivity.csv").open() as file:
        return {(row["layer"], float(row["share"])): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_each_layer_of_a_run_alone_and_what_is_refused(run, tmp_path, capsys, monkeypatch):
    folder = Path(run(*SMALL)["folder"])
    assert main(["sensitivity", str(folder), "--shares", "0,0.5,0.9"]) == 0
    assert "after pretrain" in capsys.readouterr().out and (folder / "sensitivity.png").stat().st_size > 5_000
    rows = rows_of(folder)
    assert len(rows) == 6 and {row["set"] for row in rows.values()} == {"validation"}

    def pruned(name, share):
        def change(network):
            weight = network.get_parameter(name)
            weight.flatten()[weight.abs().flatten().sort(stable=True).indices[: round(share * weight.numel())]] = 0

        return change

    for (name, share), row in rows.items():
        assert float(row["accuracy"]) == pytest.approx(accuracy_of(folder, "pretrain", pruned(name, share)))
        assert float(row["pruned"]) == pytest.approx(share, abs=0.01)
    dense = json.loads((folder / "result.json").read_text())["accuracy"]["dense"]["validation"]
    assert float(rows["fc2.weight", 0]["accuracy"]) == dense

    assert main(["sensitivity", str(folder), "--stage", "prune", "--shares=0", "--out", str(tmp_path / "a" / "b")]) == 0
    assert "after prune" in capsys.readouterr().out and len(rows_of(tmp_path / "a" / "b")) == 2
    assert main([str(folder), "--out", str(tmp_path / "summary")]) == 0

    capsys.readouterr()
    damaged, other = tmp_path / "damaged", tmp_path / "weights"
    shutil.copytree(folder, damaged), shutil.copytree(folder, other), (tmp_path / "empty").mkdir()
    (damaged / "result.json").write_text((damaged / "result.json").read_text().replace('"seed": 0', '"seed": 1'))
    network = bytearray((other / "stages" / "pretrain.safetensors").read_bytes())
    network[-1] ^= 1
    (other / "stages" / "pretrain.safetensors").write_bytes(network)
    for arguments, words in {
        (str(tmp_path / "nowhere"),): "is no folder",
        (str(tmp_path / "empty"),): "is no folder of a finished run, as it lacks result.json",
        (str(damaged),): "result.json is damaged: its checksum differs",
        (str(other),): "pretrain.safetensors is damaged",
        (str(folder), "--shares=0.5,2"): "--shares must be shares in [0, 1]",
        (str(folder), "--stage=polish"): "--stage polish is no stage of",
        (str(folder), "--shares=0", f"--out={folder}/result.json"): "cannot be written: ",
    }.items():
        assert main(["sensitivity", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


@pytest.mark.slow
def test_units_of_a_group_rule(run, capsys):
    folder = Path(run(*SMALL, "prune=group_threshold", "prune/unit=filter")["folder"])
    assert main(["sensitivity", str(folder), "--shares", "0.5"]) == 0
    assert "none of them may go: fc2" in capsys.readouterr().out  # outputs of the network
    ((key, row),) = rows_of(folder).items()

    def change(network):
        going = network.fc1.weight.square().mean(1).sqrt().sort().indices[:6]
        network.fc1.weight[going], network.fc1.bias[going] = 0, 0

    assert key == ("fc1.weight", 0.5) and float(row["pruned"]) == 0.5
    assert float(row["accuracy"]) == pytest.approx(accuracy_of(folder, "pretrain", change))


@pytest.mark.slow
def test_a_run_of_data_and_code_of_ones_own(run, tmp_path, capsys, monkeypatch):
    import numpy

    generator = numpy.random.default_rng(0)
    numpy.savez(tmp_path / "own.npz", images=generator.random((80, 6)), labels=numpy.arange(80) % 2)
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(6, 2)\n\n    def forward(self, images):\n"
        "        assert images.sum() == images.sum()  # a branch on values, which is not mapped over members\n"
        "        return self.fc(images)\n"
    )
    overrides = ("model=custom", "model.factory._target_=own_networks.Net", "trust=[own_networks]", "data=arrays")
    folder = run(*overrides, f"data.root={tmp_path}/own.npz", "stages=[pretrain]", "data.validation=0", "plots=false")
    command = ["sensitivity", folder["folder"], "--shares=0,1"]
    assert main([*command, "--trust", "own_networks"]) == 0
    assert "on test" in capsys.readouterr().out
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "own_networks.Net is code from outside" in said and "--trust own_networks" in said
    (tmp_path / "own.npz").unlink()
    assert main([*command, "--trust", "own_networks"]) == 2
    assert str(tmp_path / "own.npz") in capsys.readouterr().err
