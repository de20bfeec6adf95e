"""Files: written whole or not at all, under the umask, without leftovers; damaged ones are put aside."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sparsity import files


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_are_as_the_umask_has_them(mask, umask, tmp_path):
    umask(mask)
    files.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_that_fails_leaves_what_was_there(before, tmp_path):
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="half"), files.whole(path) as temporary:
        temporary.write_text("half of it")
        raise RuntimeError("half")
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_whatever_the_disk_refuses_leaves_nothing_half_written(step, tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, step, refuse)
        files.write_text(tmp_path / "file", "new", durable=True)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_a_folder_in_the_place_of_a_file_stays(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_text(tmp_path / "file", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_names_of_any_length_and_texts_with_names_that_are_no_text(tmp_path):
    path = tmp_path / ("é" * 127)
    files.write_text(path, os.fsdecode(b"caf\xe9"))
    assert path.read_text() == "caf\\udce9"


def test_two_at_once_write_apart(tmp_path):
    with files.whole(tmp_path / "file") as one, files.whole(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_the_first_one_stays_where_it_is_asked_for(tmp_path, monkeypatch):
    for text in ("first", "second"):
        files.write_text(tmp_path / "file", text, replace=False)
    assert (tmp_path / "file").read_text() == "first"
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    files.write_text(tmp_path / "file", "third", replace=False)
    assert (tmp_path / "file").read_text() == "third" and len(list(tmp_path.iterdir())) == 1


def _write_for_ever(path, begun):
    with files.whole(path) as temporary:
        temporary.write_text("half")
        begun.set()
        time.sleep(60)


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JUST_MADE", 0.0)
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    writer = context.Process(target=_write_for_ever, args=(tmp_path / "file", begun))
    writer.start()
    assert begun.wait(30)
    files.write_text(tmp_path / "file", "whole")
    assert len(list(tmp_path.glob(".file.*"))) == 1
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    files.write_text(tmp_path / "other", "whole")
    assert len(list(tmp_path.glob(".file.*"))) == 1  # of another file
    files.write_text(tmp_path / "file", "again")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "other"]


def test_without_locks_what_is_left_over_is_told_by_its_age(tmp_path, monkeypatch):
    path = tmp_path / f".file.1{files.PART}"
    path.write_text("")
    monkeypatch.setattr(files, "fcntl", None)
    ages = {1: False, 100: False, 100_000: True}
    for age, is_left in ages.items():
        os.utime(path, (time.time() - age,) * 2)
        assert files.is_left_over(path) == is_left
    assert not files.is_left_over(tmp_path / "nothing") and not files.is_left_over(tmp_path)


def test_what_lies_in_a_files_place(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "file", tmp_path / "link")
    os.symlink(tmp_path / "nothing", tmp_path / "lost")
    found = {name: files.obstacle(tmp_path / name) for name in ("file", "link", "pipe", "lost", ".")}
    assert found == {"file": None, "link": None, "pipe": "a pipe", "lost": "a link to nothing", ".": "a folder"}
    assert files.obstacle(Path(os.devnull)) == "a device"


def test_what_is_set_aside_is_not_lost(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        files.set_aside(tmp_path / "file")
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {
        "file.damaged": "one",
        "file.damaged-2": "two",
    }
    assert files.set_aside(tmp_path / "nothing") is None
