"""The store: keys follow what determines a stage, files are whole or set aside, a stage is computed once."""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import filelock  # noqa: F401 (another user may not be allowed to import it)
import pytest
import torch
from conftest import compose, slow

from sparsity import store
from sparsity.errors import ConfigError
from sparsity.store import Kept, Store
from sparsity.store.__main__ import _made_of, entries, keys_in_use, main, to_clean

INGREDIENTS = {"stage": "pretrain", "seed": 3, "before": {"model": {"target": "sparsity.models.mlp"}}}
KEY = store.key_of(INGREDIENTS)
SMALL = ("model=mlp", "model.factory.hidden=[8]", "plots=false")


def kept():
    return Kept({"parameters.fc": torch.arange(6.0).reshape(2, 3), "masks.fc": torch.eye(2) > 0}, {"seconds": 1.5})


@pytest.fixture
def filled(tmp_path):
    filled = Store(tmp_path / "store")
    filled.keep("pretrain", KEY, INGREDIENTS, kept=kept())
    return filled


def test_what_is_kept_is_found(filled):
    found = filled.find("pretrain", KEY)
    assert found.note == {"seconds": 1.5} and found.tensors.keys() == kept().tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in kept().tensors.items())
    assert filled.find("prune", KEY) is None and filled.find("pretrain", "0" * 32) is None
    assert [path.name for path in (filled.folder / "pretrain").iterdir()] == [f"{KEY}.safetensors"]


def test_what_is_found_is_used(filled):
    os.utime(filled.path("pretrain", KEY), (0, 0))
    filled.find("pretrain", KEY)
    assert filled.path("pretrain", KEY).stat().st_mtime > 0


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_weight(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")


def edit_the_note(path):
    path.write_bytes(path.read_bytes().replace(b"1.5", b"2.5"))


def say_nothing(path):
    from safetensors.torch import save_file

    save_file(kept().tensors, path)


def take_another_name(path):
    os.replace(path, path.with_name(f"{'0' * 32}.safetensors"))


@pytest.mark.parametrize("damage", [cut_short, flip_a_weight, edit_the_note, say_nothing, take_another_name])
def test_a_damaged_file_is_set_aside(damage, filled, caplog):
    path = filled.path("pretrain", KEY)
    damage(path)
    key = "0" * 32 if damage is take_another_name else KEY
    assert filled.find("pretrain", key) is None
    assert "is damaged" in caplog.text and "set aside" in caplog.text
    assert [path.name for path in path.parent.iterdir()] == [f"{key}.safetensors.damaged"]
    filled.keep("pretrain", KEY, INGREDIENTS, kept=kept())
    assert filled.find("pretrain", KEY) is not None


def metadata(text):
    def write(path):
        from safetensors.torch import save_file

        save_file(kept().tensors, path, metadata={"sparsity": text})

    return write


def in_its_place(make):
    def replace(path):
        path.unlink()
        make(path)

    return replace


def forged(**changes):
    """A file whose checksum is right, and whose description is not."""

    def forge(path):
        from safetensors.torch import save_file

        described = {"format": store.FORMAT, "stage": "pretrain", "ingredients": INGREDIENTS, "note": {}, **changes}
        checksum = store._checksum(kept().tensors, described)
        save_file(kept().tensors, path, metadata={"sparsity": json.dumps({**described, "checksum": checksum})})

    return forge


HOSTILE = {
    "deep": metadata("[" * 100_000),
    "no object": metadata("[1]"),
    "no json": metadata("{"),
    "number of many digits": metadata('{"format": ' + "9" * 10_000 + "}"),
    "lacks all": metadata("{}"),
    "no note": forged(note=[]),
    "of another stage": forged(stage="prune"),
    "strange ingredients": forged(ingredients=["seed"]),
    "empty": lambda path: path.write_bytes(b""),
    "long header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x00{}"),
    "a pipe": in_its_place(os.mkfifo),
    "a folder": in_its_place(os.mkdir),
    "a link to nothing": in_its_place(lambda path: os.symlink("nothing", path)),
    "a device": in_its_place(lambda path: os.symlink(os.devnull, path)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_told_in_a_line_and_computed_again(name, filled, caplog, capsys):
    path = filled.path("pretrain", KEY)
    HOSTILE[name](path)
    place = ["--store", str(filled.folder)]
    assert main([*place, "list"]) == 0 and main([*place, "clean", "--max-size", "0", "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if KEY in line]
    assert "damaged" in line or name in ("no note", "of another stage")  # `list` reads no tensors, and no notes
    assert filled.find("pretrain", KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{KEY}.safetensors is damaged" in caplog.text and "\n" not in caplog.records[0].getMessage()
    filled.keep("pretrain", KEY, INGREDIENTS, kept=kept())
    assert filled.find("pretrain", KEY) is not None
    assert main([*place, "clean", "--max-size", "0"]) == 0


def test_what_a_stage_says_of_itself_is_one_line_of_the_list(filled, capsys):
    ingredients = {**INGREDIENTS, "seed": "[red]one\ntwo\x1b[2J"}
    filled.keep("pretrain", store.key_of(ingredients), ingredients, kept=kept())
    assert main(["--store", str(filled.folder), "list"]) == 0
    assert r"seed=[red]one\ntwo\x1b[2J" in capsys.readouterr().out


def test_the_list_says_what_stages_are_made_of(tmp_path):
    from sparsity import config
    from sparsity.experiment import stage_keys

    def made_of(*overrides):
        run = config.read(compose([*SMALL, *overrides])[0], typed=overrides)
        found = stage_keys(run, "images", "cpu", "float32")
        plain = {name: json.loads(json.dumps(key.ingredients, default=str)) for name, key in found.items()}
        return {name: " ".join(_made_of(own)).partition(" after ")[0] for name, own in plain.items()}

    rounds = ("rounds=2", "schedule.pretrain.epochs=3")
    assert made_of("recipe=iterative", *rounds, "sensitivity=0.5", "reg=l1", "reg.decay=0.01") == {
        "pretrain": "mlp seed=0 epochs=3",
        "regularize": "seed=0 l1 decay=0.01 epochs=20",
        "prune": "seed=0 std sensitivity=0.158114",
        "finetune": "seed=0 epochs=10",
        "regularize-2": "seed=0 l1 decay=0.01 epochs=20",
        "prune-2": "seed=0 std sensitivity=0.5",
        "finetune-2": "seed=0 epochs=10",
    }
    found = made_of("recipe=lottery", *rounds, "rewind_to=pretrain@2", "budget.compression=9")
    assert found["pretrain@2"] == "mlp seed=0 epochs=2 of 3" and found["rewind"] == "seed=0 to=pretrain@2"
    assert found["prune"] == "seed=0 std compression=9 share=0.5" and found["prune-2"] == "seed=0 std compression=9"


def test_a_check_of_the_askers_own_sets_aside_too(filled, caplog):
    def check(found):
        raise store.Damaged("its tensors are not the network's")

    assert filled.find("pretrain", KEY, check) is None
    assert "is damaged (its tensors are not the network's): set aside" in caplog.text


@pytest.fixture
def shared():
    """A folder that other users reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "store"


@contextlib.contextmanager
def another_user():
    """What is done is done by a user who may not do everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_files_of_another_user_are_found_and_unreadable_ones_are_no_damage(shared, caplog):
    own = Store(shared)
    own.keep("pretrain", KEY, INGREDIENTS, kept=kept())
    path = own.path("pretrain", KEY)
    os.chmod(path, 0o444)
    with another_user():
        assert own.find("pretrain", KEY) is not None and caplog.text == ""
    os.chmod(path, 0)
    with another_user():
        assert own.find("pretrain", KEY) is None and own.find("pretrain", KEY) is None
    assert caplog.text.count("warning:") == 1 and "cannot be read (Permission denied)" in caplog.text
    assert path.exists()
    os.chmod(path.parent, 0)
    with another_user():
        assert own.find("pretrain", KEY) is None
        assert main(["--store", str(shared), "list"]) == 0
    os.chmod(path.parent, 0o755)


def test_a_store_that_may_only_be_read_is_read(shared, caplog):
    Store(shared).keep("pretrain", KEY, INGREDIENTS, kept=kept())
    os.chmod(shared, 0o555)
    os.chmod(shared / "pretrain", 0o555)
    with another_user():
        theirs = Store(shared)
        with theirs.claim("pretrain", [KEY]):
            assert theirs.find("pretrain", KEY) is not None
            theirs.keep("pretrain", "0" * 32, INGREDIENTS, kept=kept())
    os.chmod(shared / "pretrain", 0o755)
    os.chmod(shared, 0o755)
    (record,) = caplog.records
    assert "cannot be written (Permission denied): the stages that it holds are used" in record.getMessage()


def test_a_stage_whose_folder_is_another_users_is_told_and_costs_nothing_else(shared, caplog):
    Store(shared).keep("pretrain", KEY, INGREDIENTS, kept=kept())
    os.chmod(shared, 0o777)
    os.chmod(shared / "pretrain", 0o555)
    with another_user():
        theirs = Store(shared)
        for key in ("0" * 32, "1" * 32):
            with theirs.claim("pretrain", [key]):
                theirs.keep("pretrain", key, INGREDIENTS, kept=kept())
    os.chmod(shared / "pretrain", 0o755)
    assert [record.getMessage().partition("store ")[2] for record in caplog.records] == [
        "has no lock for pretrain (Permission denied): it may be computed more than once",
        "cannot keep pretrain (Permission denied): the run continues without",
    ]


def test_a_lock_that_is_none_costs_a_warning(filled, caplog):
    lock = filled.path("prune", KEY).with_suffix(".lock")
    lock.mkdir(parents=True)
    with filled.claim("prune", [KEY]):
        filled.keep("prune", KEY, INGREDIENTS, kept=kept())
    assert "has no lock for prune (Is a directory): it may be computed more than once" in caplog.text
    assert filled.path("prune", KEY).exists() and lock.exists()


def test_a_disk_that_refuses_costs_a_warning(filled, monkeypatch, caplog):
    def refuse(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    filled.keep("prune", KEY, INGREDIENTS, kept=kept())
    assert "No space left on device" in caplog.text and list((filled.folder / "prune").iterdir()) == []


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"store=.*file/store cannot be written .*store=null"):
        Store(tmp_path / "file" / "store")


def _hold(folder, held, end):
    with Store(folder).claim("pretrain", [KEY]):
        held.set()
        end.wait(30)


@pytest.mark.slow
def test_a_lock_is_waited_for_and_dies_with_its_owner(tmp_path, caplog):
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    owner = context.Process(target=_hold, args=(tmp_path, held, end))
    owner.start()
    assert held.wait(60)
    os.kill(owner.pid, signal.SIGSTOP)  # neither ends nor lets go
    threading.Timer(0.5, os.kill, (owner.pid, signal.SIGKILL)).start()
    with caplog.at_level("INFO"), Store(tmp_path).claim("pretrain", [KEY]):
        assert not owner.is_alive()
    assert "waits for another process" in caplog.text
    owner.join()


def test_locks_are_taken_in_one_order_and_each_once(tmp_path, monkeypatch):
    own, taken = Store(tmp_path), []
    monkeypatch.setattr(own, "_lock", lambda stage, key: taken.append(key) or contextlib.nullcontext())
    with own.claim("pretrain", ["b", "c", "a", "b"]):  # two that wait for each other's would wait for ever
        assert taken == ["a", "b", "c"]


def test_a_finished_stage_leaves_no_lock(tmp_path):
    own = Store(tmp_path)
    with own.claim("pretrain", [KEY]):
        assert own.path("pretrain", KEY).with_suffix(".lock").exists()
        own.keep("pretrain", KEY, INGREDIENTS, kept=kept())
    assert [path.suffix for path in (tmp_path / "pretrain").iterdir()] == [".safetensors"]


# --- keys ------------------------------------------------------------------------------------------------------------


CHANGES = {
    "model.factory.hidden=[9]": "pretrain",
    "seed=1": "pretrain",
    "data.validation_seed=1": "pretrain",
    "data.normalize={mean:[0.1],std:[0.3]}": "pretrain",
    "schedule.batch_size=51": "pretrain",
    "optimizer=sgd": "pretrain",
    "precision=bfloat16": "pretrain",
    "schedule.pretrain.lr=0.01": "pretrain",
    "reg.decay=0.5": "regularize",
    "reg=l1": "regularize",
    "reg.apply_to=[weight]": "regularize",
    "schedule.regularize.epochs=3": "regularize",
    "sensitivity=0.7": "prune",
    "prune.layers.fc1=0.5": "prune",
    "prune=threshold": "prune",
    "schedule.finetune.epochs=3": "finetune",
    "plots=true": None,
    "threads=2": None,
    "objectives=[accuracy,macs]": None,
}


@pytest.fixture(scope="module")
def keys():
    """The keys of a run's stages, whatever the overrides."""
    import torch

    from sparsity import config
    from sparsity.experiment import load_data, precision_of, stage_keys

    @functools.cache
    def keys(*overrides):
        composed, _ = compose(["data=digits", "schedule=smoke", "precision=float32", *SMALL, *overrides])
        run = config.read(composed, typed=overrides)
        found = stage_keys(run, load_data(run)[1], "cpu", precision_of(run, torch.device("cpu")))
        return {stage: key.key for stage, key in found.items()}

    return keys


@pytest.mark.parametrize("override", CHANGES)
def test_a_key_changes_with_what_determines_it_and_with_nothing_else(override, keys):
    before, after = keys(), keys(override)
    same = [stage for stage in before if before[stage] == after[stage]]
    stages = list(before)
    assert same == (stages if CHANGES[override] is None else stages[: stages.index(CHANGES[override])])


def test_keys_follow_the_device_and_the_format_of_the_store(monkeypatch):
    from sparsity import config
    from sparsity.experiment import stage_keys

    run = config.read(compose(SMALL)[0])
    before, there = stage_keys(run, "images", "cpu", "float32"), stage_keys(run, "images", "cuda", "float32")
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    later = stage_keys(run, "images", "cpu", "float32")
    for stage in run.stages:
        assert len({keys[stage].key for keys in (before, there, later)}) == 3


@pytest.mark.parametrize(
    ("part", "first"),
    [("mlp", "pretrain"), ("hs", "regularize"), ("magnitude", "prune"), ("entry", "prune"), ("std", "prune")],
)
def test_keys_follow_the_code_of_every_method(part, first, monkeypatch):
    from sparsity import config
    from sparsity.experiment import stage_keys

    run, code_of = config.read(compose(SMALL)[0]), store.code_of
    before = stage_keys(run, "images", "cpu", "float32")
    monkeypatch.setattr(store, "code_of", lambda t, f: {"edited": ""} if f.__name__ == part else code_of(t, f))
    after = stage_keys(run, "images", "cpu", "float32")
    same = [stage for stage in run.stages if before[stage].key == after[stage].key]
    assert same == list(run.stages)[: list(run.stages).index(first)]


def test_keys_follow_what_a_weights_file_holds_and_not_its_name(tmp_path):
    from dataclasses import replace

    from sparsity import config
    from sparsity.experiment import stage_keys

    def key(name, content):
        (tmp_path / name).write_bytes(content)
        run = config.read(compose(SMALL)[0])
        run = replace(run, model=replace(run.model, weights=str(tmp_path / name)))
        return stage_keys(run, "images", "cpu", "float32")["finetune"].key

    assert key("one.pth", b"same") == key("other.pth", b"same") != key("one.pth", b"edited")


def test_a_decay_without_a_penalty_changes_no_key(keys):
    assert keys("reg=none") == keys("reg=none", "reg.decay=0.5")


WITHOUT_EFFECT = {  # on a recipe's keys: what no listed stage's node mentions, and what rounds are made of
    "standard": ["rounds=5", "rewind_to=pretrain@1", "ramp.curve=cubic", "ramp.from=0.05"],
    "magnitude": ["reg=l1", "reg.decay=0.5", "schedule.regularize.epochs=7"],
    "at_init": ["schedule.finetune.lr=0.5", "schedule.regularize.lr=0.5", "reg.apply_to=[weight]"],
    "lottery": ["schedule.finetune.lr=0.5", "ramp.from=0.1", "reg=l1", "prune.search.sensitivity='interval(0.2,0.3)'"],
}


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        pair
        for name, (first, *more) in WITHOUT_EFFECT.items()
        for pair in ((name, first), *slow(*((name, text) for text in more)))
    ],
)
def test_what_no_listed_stage_reads_changes_no_key(recipe, override, keys):
    base = (f"recipe={recipe}", "rounds=1") if recipe != "standard" else ()
    assert keys(*base) == keys(*base, override)


def test_recipes_share_the_stages_that_are_alike(keys):
    standard, magnitude, lottery = (
        keys(f"recipe={name}", "prune=std") for name in ("standard", "magnitude", "lottery")
    )
    assert standard["pretrain"] == magnitude["pretrain"] == lottery["pretrain"]
    assert magnitude["prune"] == lottery["prune"] != standard["prune"]  # what comes before it is another
    assert keys("recipe=magnitude", "reg=l1", "prune=std") == magnitude
    assert keys("stages=[pretrain,prune,finetune]") == magnitude


def test_rounds_share_what_does_not_depend_on_their_number(keys):
    constant = ("recipe=iterative", "ramp.curve=constant")
    few, many = keys(*constant, "rounds=2"), keys(*constant, "rounds=4")
    assert few.items() <= many.items() and len(set(many.values())) == len(many) == 13
    share = ("recipe=lottery", "prune=percentile", "sensitivity=0.2")
    assert keys(*share, "rounds=2").items() <= keys(*share, "rounds=3").items()
    rising = ("recipe=iterative", "ramp.curve=geometric")
    few, many = keys(*rising, "rounds=2"), keys(*rising, "rounds=4")
    assert {name for name in few if few[name] == many[name]} == {"pretrain", "regularize"}


def test_the_last_rounds_strength_is_of_the_last_round_alone(keys):
    base = ("recipe=iterative", "rounds=3", "ramp.curve=constant", "ramp.from=0.1")
    one, other = keys(*base, "sensitivity=0.3"), keys(*base, "sensitivity=0.6")
    assert [name for name in one if one[name] != other[name]] == ["prune-3", "finetune-3"]
    base = ("recipe=iterative", "rounds=3", "ramp.curve=constant", "ramp.from=0.3")
    one, other = keys(*base, "budget.compression=9"), keys(*base, "budget.compression=11")
    assert [name for name in one if one[name] != other[name]] == ["prune-3", "finetune-3"]


def test_a_sensitivity_does_not_count_where_a_budget_holds(keys):
    assert keys("budget.nonzero=50", "prune=std") == keys("prune=std", "budget={nonzero:50}", "sensitivity=null")
    one, other = keys("budget.nonzero=50"), keys("budget.nonzero=51")
    assert [name for name in one if one[name] != other[name]] == ["prune", "finetune"] and one != keys()


def test_a_state_has_a_key_of_its_own_and_counts_where_it_is_named(keys):
    base = ("recipe=lottery", "rounds=2", "schedule.pretrain.epochs=3")
    found = {to: keys(*base, f"rewind_to={to}") for to in ("start", "pretrain", "pretrain@1", "pretrain@2")}
    assert "pretrain@1" not in found["start"] and "pretrain@1" not in found["pretrain"]
    assert len({*found["pretrain@1"].values(), found["pretrain@2"]["pretrain@2"]}) == len(found["pretrain@1"]) + 1
    for name in ("pretrain", "prune"):
        assert len({each[name] for each in found.values()}) == 1
    for name in ("rewind", "train", "prune-2", "rewind-2", "train-2"):
        assert len({each[name] for each in found.values()}) == 4
    longer = keys(*base, "rewind_to=pretrain@1", "schedule.pretrain.epochs=4")
    assert longer["pretrain@1"] != found["pretrain@1"]["pretrain@1"]  # its learning rate is the whole schedule's


def test_a_key_follows_the_numbers_of_a_node_wherever_they_are_typed(keys):
    literal = "recipe.finetune.schedule={epochs:2,lr:0.001,shape:cosine,warmup:0.0,weight_decay:0.0}"
    typed = [
        f"schedule.finetune.{text}" for text in ("epochs=2", "lr=0.001", "shape=cosine", "warmup=0", "weight_decay=0")
    ]
    assert keys(literal) == keys(*typed) != keys(*typed[:1], "schedule.finetune.lr=0.002")
    held = keys("recipe.finetune.hold=masks")
    assert [name for name in held if held[name] != keys()[name]] == ["finetune"]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_sweep_computes_no_stage_twice(run, tmp_path):
    base = (*SMALL, f"store={tmp_path / 'store'}")
    runs = [run(*base, f"reg.decay={decay}", f"sensitivity={cut}") for decay in (0, 1e-4) for cut in (0.1, 0.5)]
    assert [result["computed"] for result in runs] == [
        ["pretrain", "regularize", "prune", "finetune"],
        ["prune", "finetune"],
        ["regularize", "prune", "finetune"],
        ["prune", "finetune"],
    ]
    counts = {path.name: len(list(path.iterdir())) for path in (tmp_path / "store").iterdir()}
    assert counts == {"pretrain": 1, "regularize": 2, "prune": 4, "finetune": 4}


@pytest.mark.slow
def test_a_run_from_the_store_is_the_run_that_filled_it(run, tmp_path):
    base = (*SMALL, f"store={tmp_path / 'store'}")
    first, second, alone = run(*base), run(*base), run(*SMALL, "store=null")
    assert second["computed"] == [] and alone["computed"] == first["computed"] == first["stages"]
    for other in (second, alone):
        for name in ("accuracy", "layers", "macs", "warnings", "keys", "selection"):
            assert other[name] == first[name]
        for name in ("model.safetensors", "stages/regularize.safetensors", "layers.csv"):
            files = [(tmp_path / result["folder"] / name).read_bytes() for result in (first, other)]
            assert files[0] == files[1], name
    rows = [(tmp_path / result["folder"] / "history.csv").read_text() for result in (first, second)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_damaged_stage_is_computed_again(run, tmp_path, caplog):
    base = (*SMALL, f"store={tmp_path / 'store'}")
    first = run(*base)
    cut_short(next((tmp_path / "store" / "regularize").iterdir()))
    second = run(*base)
    assert second["computed"] == ["regularize"] and "is damaged" in caplog.text
    files = [(tmp_path / result["folder"] / "stages" / "regularize.safetensors") for result in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert second["accuracy"] == first["accuracy"]


@pytest.mark.slow
def test_what_another_process_kept_meanwhile_is_taken(run, tmp_path, monkeypatch):
    first = run(*SMALL, f"store={tmp_path / 'theirs'}")
    claim = Store.claim

    @contextlib.contextmanager
    def waited_for(self, stage, keys):
        with claim(self, stage, keys):
            shutil.copytree(tmp_path / "theirs" / stage, self.folder / stage, dirs_exist_ok=True)
            yield

    monkeypatch.setattr(Store, "claim", waited_for)
    second = run(*SMALL, f"store={tmp_path / 'ours'}")
    assert second["computed"] == [] and second["accuracy"] == first["accuracy"]


def test_a_diverged_stage_is_not_kept(run, tmp_path):
    from sparsity.errors import DivergedError

    with pytest.raises(DivergedError):
        run(*SMALL, f"store={tmp_path / 'store'}", "schedule.regularize.lr=1e30", "optimizer=sgd")
    assert [path.parent.name for path in (tmp_path / "store").glob("*/*.safetensors")] == ["pretrain"]


@pytest.mark.slow
def test_a_finished_folder_gives_its_result(run, tmp_path):
    base = (*SMALL, f"hydra.run.dir={tmp_path / 'one'}", "store=null")
    first = run(*base)
    stamp = (tmp_path / "one" / "result.json").stat().st_mtime_ns
    assert run(*base)["accuracy"] == first["accuracy"]
    assert (tmp_path / "one" / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="holds a finished run"):
        run(*base, "seed=1")


@pytest.fixture(scope="module")
def stage_kept():
    """A stage of a small network as the store keeps it, and the network before it."""
    from functools import partial

    from sparsity.experiment.stored import tensors_of
    from sparsity.models import build, mlp
    from sparsity.population import stack

    population = stack([build(partial(mlp, hidden=[3]), (1, 2, 2), 2, 0)])
    row = {"epoch": 0, "loss": None, "penalty": None, "objective": None, "validation": 0.5, "test": 0.5, "lr": 1.0}
    note = {
        "did": ["masked"],
        "history": [{**row, "seconds": 0.1}],
        "selected_epoch": 0,
        "diverged": None,
        "stds": {"fc1.weight": 0.1},
        "thresholds": {"fc1.weight": 0.2},
        "accuracy": {"validation": None, "test": 0.5},
        "seconds": 1.5,
        "computed_with": {"threads": 1},
    }
    return tensors_of(population, 0), note, population


WRONG_NOTES = {
    "lacks seconds": lambda note: note.pop("seconds"),
    "seconds in words": lambda note: note.update(seconds="1.5"),
    "endless": lambda note: note.update(seconds=float("inf")),
    "yes or no": lambda note: note.update(seconds=True),
    "lacks accuracy": lambda note: note.update(accuracy={}),
    "accuracy in words": lambda note: note.update(accuracy={"validation": "high", "test": 0.5}),
    "no rows": lambda note: note.update(history=5),
    "a row that lacks all": lambda note: note.update(history=[{}]),
    "a row of lists": lambda note: note["history"][0].update(test=[0.5]),
    "no such epoch": lambda note: note.update(selected_epoch=7),
    "epoch in words": lambda note: note.update(selected_epoch="first"),
    "diverged": lambda note: note.update(diverged=1),
    "deeds that are none": lambda note: note.update(did=["danced"]),
    "no circumstances": lambda note: note.update(computed_with=None),
}


@pytest.mark.parametrize("name", WRONG_NOTES)
def test_notes_that_lack_what_a_result_takes_are_refused(name, stage_kept):
    from sparsity.experiment.stored import check

    tensors, note, population = stage_kept
    check(Kept(tensors, note), population)
    note = copy.deepcopy(note)
    WRONG_NOTES[name](note)
    with pytest.raises((store.Damaged, LookupError, TypeError, ValueError, AttributeError)):
        check(Kept(tensors, note), population)


@pytest.mark.parametrize("thresholds", [None, {"fc1.weight": "0.2"}, {"fc1.weight": [0.2]}])
def test_notes_of_pruning_are_refused(thresholds, stage_kept):
    from sparsity.experiment.stored import check

    tensors, note, population = stage_kept
    check(Kept(tensors, note), population)
    with pytest.raises((store.Damaged, AttributeError)):
        check(Kept(tensors, {**note, "thresholds": thresholds}), population)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters.fc1.weight": None},
        {"parameters.fc1.weight": torch.zeros(4, 3)},
        {"parameters.fc1.weight": torch.zeros(3, 4).double()},
        {"masks.fc1.weight": torch.ones(3, 4)},
        {"masks.fc1.weight": torch.ones(4, 3) > 0},
        {"buffers.more": torch.zeros(1)},
    ],
    ids=str,
)
def test_tensors_that_are_not_the_networks_are_refused(change, stage_kept):
    from sparsity.experiment.stored import check

    tensors, note, population = stage_kept
    check(Kept({**tensors, "masks.fc1.weight": torch.ones(3, 4) > 0}, note), population)
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(store.Damaged, match="tensors are not the network's"):
        check(Kept(changed, note), population)


def test_a_result_says_what_its_stages_were_computed_with(run, tmp_path, caplog, monkeypatch):
    base = (*SMALL, "stages=[pretrain]", f"store={tmp_path / 'store'}")
    first = run(*base, "threads=1")
    with caplog.at_level("INFO"):
        second = run(*base, "threads=2")
    assert first["computed_with"] == second["computed_with"] and second["environment"]["threads"] == 2
    assert first["computed_with"]["pretrain"]["threads"] == 1
    assert first["computed_with"]["pretrain"]["torch"] == torch.__version__
    assert "from the store | computed in" in caplog.text and "with threads=1" in caplog.text


def test_a_stage_of_another_network_under_the_same_key_is_computed_again(run, tmp_path, caplog):
    base = (*SMALL, "stages=[pretrain]", f"store={tmp_path / 'store'}")
    run(*base)
    path = next((tmp_path / "store" / "pretrain").iterdir())
    described, own = store.read_description(path), Store(tmp_path / "store")
    own.keep("pretrain", path.stem, described["ingredients"], kept=Kept(kept().tensors, described["note"]))
    assert run(*base)["computed"] == ["pretrain"]
    assert "its tensors are not the network's" in caplog.text


# --- the command line ------------------------------------------------------------------------------------------------


def test_cleaning_by_age_size_and_use(filled, tmp_path):
    for number in range(3):
        ingredients = {**INGREDIENTS, "seed": number}
        filled.keep("pretrain", store.key_of(ingredients), ingredients, kept=kept())
        os.utime(filled.path("pretrain", store.key_of(ingredients)), (1000 * number, 1000 * number))
    found = entries(filled.folder)
    size = found[0].num_bytes
    nothing = {"now": 2500.0, "age": None, "size": None, "used": None}
    assert [entry.last_used for entry in found[1:]] == [2000, 1000, 0] and found[0].key == KEY
    assert to_clean(found, **nothing) == []
    assert to_clean(found, **{**nothing, "age": 1000.0}) == found[2:]
    assert to_clean(found, **{**nothing, "size": 2 * size + 10}) == found[2:]
    assert to_clean(found, **{**nothing, "used": {KEY}}) == found[1:]
    (tmp_path / "results" / "0").mkdir(parents=True)
    (tmp_path / "results" / "0" / "result.json").write_text(json.dumps({"keys": {"pretrain": KEY}}))
    assert keys_in_use([tmp_path / "results"]) == {KEY}


def test_files_that_are_being_written_are_left_alone(filled):
    for name in (".half.safetensors.123", ".left.safetensors.124"):
        (filled.folder / "pretrain" / name).write_bytes(b"")
    os.utime(filled.folder / "pretrain" / ".left.safetensors.124", (0, 0))  # whose process ended long ago
    assert [entry.path.name for entry in entries(filled.folder)] == [f"{KEY}.safetensors", ".left.safetensors.124"]


def test_the_command_line(filled, tmp_path, capsys):
    place = ["--store", str(filled.folder)]
    assert main([*place, "list"]) == 0
    listed = capsys.readouterr().out
    assert KEY in listed and "mlp seed=3" in listed and "1 stages" in listed
    assert main([*place, "clean", "--older-than", "0s", "--dry-run"]) == 0 and filled.path("pretrain", KEY).exists()
    assert main([*place, "clean"]) == 2 and "clean needs one of" in capsys.readouterr().err
    assert main([*place, "clean", "--unused", "--results", str(tmp_path / "no")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main([*place, "clean", "--older-than", "0s"]) == 0 and not filled.path("pretrain", KEY).exists()
    assert main(["--store", str(tmp_path / "no"), "list"]) == 2 and "is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*place, "clean", "--max-size", "3x"])
    assert "such as 10G" in capsys.readouterr().err
