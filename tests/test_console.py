"""What is shown, whatever the terminal: its encoding, its width, and names that hold anything."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

from sparsity import console, results, tables
from sparsity.accounting import Report, Row
from sparsity.streams import be_lenient, be_quiet, shown
from sparsity.tables import Column, fitted, show_table, wrapped
from sparsity.training import Epoch


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def encoded(encoding):
    """A stream that takes bytes, as a pipe or a file does, and what came through it."""
    raw = io.BytesIO()
    return io.TextIOWrapper(raw, encoding=encoding, write_through=True), raw


# --- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", "3x +-1 -> <= ... ? e inf"), ("latin-1", "3× ±1 -> <= ... ? é inf"), ("utf-8", "3× ±1 → ≤ … 网 é ∞")],
)
def test_what_an_encoding_lacks_is_written_in_ascii(encoding, expected, monkeypatch):
    stream, raw = encoded(encoding)
    assert shown("3× ±1 → ≤ … 网 é ∞", stream) == expected
    monkeypatch.setattr(sys, "stdout", stream)
    be_lenient()
    print("3× ±1 → ≤ … 网 é ∞")
    assert raw.getvalue().decode(encoding) == f"{expected}\n"


def test_bytes_that_are_no_text_are_shown_too(monkeypatch):
    stream, raw = encoded("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    be_lenient()
    print(os.fsdecode(b"a\xff"))
    assert raw.getvalue() == b"a?\n"


def test_streams_that_cannot_be_told_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    be_lenient()


def main(*arguments, **environment):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=300)


@pytest.mark.slow
def test_help_in_ascii():
    done = main("--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii()
    assert b"pretrain -> regularize -> prune -> finetune" in done.stdout


@pytest.mark.slow
def test_a_run_its_log_and_its_tables_where_nothing_is_utf_8(tmp_path):
    small = ("data=digits", "schedule=smoke", "model=mlp", "model.factory.hidden=[8]", "plots=false", "threads=1")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = main(*small, "store=kept", "hydra.run.dir=run", "sensitivity=50", **plain)
    assert done.returncode == 0 and b"error" not in done.stderr.lower() and done.stdout.isascii(), done.stderr
    assert "pruned all of" in (tmp_path / "run" / "main.log").read_text(encoding="utf-8")
    for arguments in (["sparsity.results", "run"], ["sparsity.store", "--store", "kept", "list"]):
        command = [sys.executable, "-m", *arguments]
        environment = {**os.environ, **plain, "PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("module", "is_shown"), [("torch.nn", False), ("mine", True), ("mine.nets", True), ("mines", False)]
)
def test_warnings_are_those_of_a_user_s_own_modules(module, is_shown, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setenv("PYTHONWARNINGS", "")
    with warnings.catch_warnings(record=True) as heard:
        be_quiet(["mine", "other.*"])
        warnings.warn_explicit("beware", UserWarning, "nets.py", 1, module=module)
    assert bool(heard) == is_shown and os.environ["PYTHONWARNINGS"] == "ignore"


def test_warnings_that_are_asked_for_are_shown(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings():
        before = list(warnings.filters)
        be_quiet([])
        assert warnings.filters == before


def test_what_is_waited_for_is_shown_in_a_terminal_alone(monkeypatch, capsys):
    with console.waiting("reading data=mnist"):
        pass
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError), console.waiting("reading data=mnist"):
        raise ValueError
    assert terminal.getvalue() == "reading data=mnist\r\r\033[K"


# --- tables ----------------------------------------------------------------------------------------------------------


def table(monkeypatch, capsys, width, columns=None, **more):
    """The lines of a table at a width."""
    monkeypatch.setenv("COLUMNS", str(width))
    show_table(columns or FRONT, **more)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    return "\n".join(line.rstrip() for line in lines)


FOLDERS = ["outputs/sweeps/lenet300-mnist-hs-std-96d380c0/7", "outputs/sweeps/lenet300-mnist-hs-std-96d380c0/12"]
FRONT = [
    Column("", ["1", "2"]),
    Column("schedule.finetune.epochs", ["[fc1]", "[/x],[conv1,conv2,conv3]"], rank=1, cut="end", least=12),
    Column("validation", ["98.00% ± 0.25", "97.10% ± 0.30"]),
    Column("structure", ["784-300-100", "588-140-65"], rank=5),
    Column("folder", FOLDERS, is_text=True, rank=2, cut="start", least=10),
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
def test_a_table_fits_and_its_rows_are_one_line_each(width, monkeypatch, capsys):
    text = table(monkeypatch, capsys, width)
    for value in ("98.00% ± 0.25", "97.10% ± 0.30"):
        assert value in text
    rows = [line for line in text.splitlines() if "%" in line]
    assert len(rows) == 2
    if width >= 60:
        assert "…" in rows[1] or FOLDERS[1] in rows[1]
        assert all("/7" in rows[0] and "/12" in rows[1] for _ in rows)  # the end of a folder is what tells them apart
    if width == 200:
        assert all(folder in text for folder in FOLDERS) and "schedule.finetune.epochs" in text and "┃" in text


def test_columns_go_by_rank():
    names = [[column.name.lstrip("….") for column in fitted(FRONT, room)] for room in (200, 62, 50, 36, 20)]
    assert [len(each) for each in names] == [5, 5, 4, 3, 2]
    assert names[2][-1] == "folder" and "structure" not in names[2] and names[-1] == ["", "validation"]


def test_texts_are_shown_as_they_are(monkeypatch, capsys):
    cells = ["[/x]", "[bold]b[/bold]", ":smile:", "[1,2]", "a\nb\x1b[31m", "网络"]
    text = table(monkeypatch, capsys, 100, [Column("[/n]", cells, is_text=True)], title="[t] of [/]", caption="[c]")
    for word in ("[/n]", "[t] of [/]", "[c]", "[/x]", "[bold]b[/bold]", ":smile:", "[1,2]", r"a\nb\x1b[31m", "网络"):
        assert word in text


def test_sums_stand_below_a_line(monkeypatch, capsys):
    lines = table(monkeypatch, capsys, 60, [Column("n", ["1", "2", "3"])], num_sums=1).splitlines()
    assert lines[-3].startswith("├") and lines[-2] == "│ 3 │"


def test_a_table_in_ascii(monkeypatch):
    for width in ("60", "200"):
        stream, raw = encoded("ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", width)
        show_table(FRONT, title="front ×")
        lines = raw.getvalue().decode("ascii").splitlines()
        assert "98.00% +- 0.25" in "\n".join(lines) and len({len(line) for line in lines[1:]}) == 1


def test_without_a_terminal_there_is_room(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    show_table(FRONT)
    assert FOLDERS[1] in capsys.readouterr().out


def test_a_line_is_broken_between_its_parts():
    parts = ["test accuracy 98.25% → 98.09% (epoch 11, selected on validation)", "compression 34.2×", "files in /a/b"]
    assert wrapped(parts, 200) == " | ".join(parts)
    assert wrapped(parts, 80).splitlines() == [parts[0], f"  {parts[1]} | {parts[2]}"]
    narrow = wrapped(parts, 30).splitlines()
    assert max(map(len, narrow)) <= 30 and " ".join(line.strip() for line in narrow) == " ".join(parts)
    assert wrapped(["files in /a/very/long/folder/name"], 12).splitlines() == ["files in", "  /a/very/long/folder/name"]


def test_lines_stay_whole_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    tables.say_parts(["one of several", "and another one"])
    assert capsys.readouterr().out == "one of several | and another one\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    tables.say_parts(["one of several", "and another one"])
    assert terminal.getvalue() == "one of several\n  and another one\n"


# --- the report ------------------------------------------------------------------------------------------------------


def report(names):
    rows = [
        Row(name, "weight", [10 + place, 10], 0.1, 0.01, 5, 100 + 10 * place, 0.05, 3, 2, 6, 8)
        for place, name in enumerate(names)
    ]
    counts = {"weights": 5 * len(rows), "parameters": 5 * len(rows)}
    total = {"weights": sum(row.total for row in rows), "parameters": sum(row.total for row in rows)}
    macs = {"dense": 100, "pruned": 6, "removable": 8}
    return Report(rows, counts, total, {"weights": 2.0, "parameters": 2.0}, macs, "3", "10")


def test_names_of_layers_are_shown_as_they_are(capsys, monkeypatch):
    for width in ("60", "80", "200"):
        monkeypatch.setenv("COLUMNS", width)
        console.show_report("after [prune]", report(["[/x].weight", "[red]y.weight"]))
        text = capsys.readouterr().out
        assert "[/x].weight" in text and "[red]y.weight" in text and "after [prune]" in text
        assert max(map(len, text.splitlines())) <= int(width) and "non-zeros" in text and "density" in text


def test_of_many_tensors_the_largest_are_shown(capsys):
    console.show_report("after prune", report([f"layer{place}.weight" for place in range(100)]))
    text = capsys.readouterr().out
    assert f"the largest {console.MAX_ROWS} tensors; {100 - console.MAX_ROWS} more are in layers.csv" in text
    assert len(re.findall(r"layer\d+\.weight", text)) == console.MAX_ROWS
    assert "layer99.weight" in text and "layer0.weight" not in text


def test_both_counts_of_macs_are_named():
    assert results.macs_left({"dense": 1000, "pruned": 10}) == "MACs 10 of 1,000"
    said = results.macs_left({"dense": 1000, "pruned": 10, "removable": 20})
    assert said == "MACs 10 as papers count, 20 once dead units are removed, of 1,000"


# --- progress --------------------------------------------------------------------------------------------------------

EPOCH = Epoch(12, [0.12345], [12345.678], [0.5], [0.98], None, 0.001, 1.5)


def test_an_epoch_in_few_words():
    whole = "epoch 12/100 | loss 0.1235 | penalty 1.235e+04 | validation 98.00%"
    assert console.describe(EPOCH, 100) == whole
    assert console.describe(EPOCH, 100, len(whole)) == whole
    assert console.describe(EPOCH, 100, len(whole) - 1) == "epoch 12/100 | loss 0.1235 | validation 98.00%"
    assert console.describe(EPOCH, 100, 40) == "epoch 12/100 | validation 98.00%"
    assert console.describe(EPOCH, 100, 5) == "epoch 12/100"


def test_the_last_epoch_says_that_it_was_by_kernels():
    assert console.describe(EPOCH, 12, way="kernels").endswith(" | by kernels")
    assert "kernels" not in console.describe(EPOCH, 12) + console.describe(EPOCH, 100, way="kernels")
    assert console.describe(EPOCH, 12, 60, way="kernels") == console.describe(EPOCH, 12, 60)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_bar_is_one_line(width, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    progress = console.StageProgress("regularize", 100, 5, way="compiled")
    for _ in range(5):
        progress.batch()
    progress.epoch(EPOCH)
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line]
    assert max(map(len, lines)) <= width and all(line.startswith("regularize") for line in lines)
    assert "epoch 12/100" in lines[-1] and (width < 60 or "validation 98.00%" in lines[-1])


def test_plain_lines_without_a_terminal(caplog):
    with caplog.at_level(logging.INFO, "sparsity"):
        progress = console.StageProgress("regularize", 12, 5, way="compiled")
        progress.epoch(EPOCH)
        progress.close()
    assert caplog.messages[0] == "regularize compiling the training step"
    assert caplog.messages[1].startswith("regularize epoch 12/12 | loss") and len(caplog.messages) == 2
