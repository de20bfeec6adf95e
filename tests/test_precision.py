"""precision=auto: measured once on a machine, kept, and the same for all that run there."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from sparsity.experiment import precision

CPU = torch.device("cpu")
AUTO = SimpleNamespace(precision="auto")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of kept measurements, empty, and no decision remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    precision._decided.cache_clear()
    yield tmp_path / "sparsity"
    precision._decided.cache_clear()


def times(monkeypatch, float32, bfloat16):
    given = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(precision, "_seconds", lambda left, right: given[left.dtype])


@pytest.mark.parametrize(("bfloat16", "decided"), [(0.3, "bfloat16"), (0.9, "float32"), (3.0, "float32")])
def test_the_faster_one_is_taken(bfloat16, decided, folder, monkeypatch):
    times(monkeypatch, 1.0, bfloat16)
    assert precision.precision_of(AUTO, CPU) == decided
    (kept,) = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert kept["precision"] == decided and kept["seconds"] == {"float32": 1.0, "bfloat16": bfloat16}
    assert 0 < kept["error"] < precision.CLOSE and kept["torch"] == torch.__version__ and kept["processor"]


def test_it_is_measured_once(folder, monkeypatch, caplog):
    times(monkeypatch, 1.0, 0.3)
    with caplog.at_level(logging.INFO):
        precision.precision_of(AUTO, CPU)
        precision._decided.cache_clear()
        times(monkeypatch, 0.3, 1.0)
        assert precision.precision_of(AUTO, CPU) == "bfloat16"
    assert caplog.text.count("as measured now") == 1


@pytest.mark.parametrize("what", ["_processor", "torch.__version__"])
def test_another_processor_or_torch_is_measured_again(what, folder, monkeypatch):
    times(monkeypatch, 1.0, 0.3)
    precision.precision_of(AUTO, CPU)
    precision._decided.cache_clear()
    times(monkeypatch, 0.3, 1.0)
    monkeypatch.setattr(f"sparsity.experiment.precision.{what}", "2.99" if "version" in what else lambda: "another")
    assert precision.precision_of(AUTO, CPU) == "float32" and len(list(folder.iterdir())) == 2


def test_products_that_are_wrong_are_not_taken(folder, monkeypatch):
    times(monkeypatch, 1.0, 0.1)
    monkeypatch.setattr(precision, "CLOSE", 1e-9)
    assert precision.precision_of(AUTO, CPU) == "float32"


def test_the_first_of_two_processes_decides(folder, monkeypatch):
    times(monkeypatch, 1.0, 0.3)
    precision.precision_of(AUTO, CPU)
    (path,) = folder.iterdir()
    assert precision._keep(path, {"precision": "float32"})["precision"] == "bfloat16"
    assert list(folder.iterdir()) == [path]


def test_a_damaged_file_is_measured_again(folder, monkeypatch):
    times(monkeypatch, 1.0, 0.3)
    precision.precision_of(AUTO, CPU)
    (path,) = folder.iterdir()
    path.write_text("{")
    precision._decided.cache_clear()
    assert precision.precision_of(AUTO, CPU) == "bfloat16" and json.loads(path.read_text())["precision"] == "bfloat16"


def test_a_folder_that_cannot_be_written_costs_a_warning(folder, monkeypatch, caplog):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    times(monkeypatch, 1.0, 0.3)
    assert precision.precision_of(AUTO, CPU) == "bfloat16" and "cannot be written" in caplog.text


def test_what_is_asked_for_is_not_measured(folder):
    assert precision.precision_of(SimpleNamespace(precision="bfloat16"), CPU) == "bfloat16"
    assert precision.precision_of(AUTO, torch.device("meta")) == "float32" and not folder.exists()
