"""The code in a stage's key: every file of ours that can change its numbers, and all that a user's code imports."""

import importlib
import sys

import pytest
import torch
from conftest import ROOT, compose, slow

from sparsity import store
from sparsity.experiment import keys
from sparsity.store import code

USES = "def penalty(weight):\n    return {}\n"
HELPER = "def f(x):\n    return x * 2\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes modules and gives the code of `my_methods.penalty`, imported anew."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def written(texts):
        for name, text in texts.items():
            path = (tmp_path / name).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name in set(sys.modules) - before:
            del sys.modules[name]
        importlib.invalidate_caches()
        module = importlib.import_module("my_methods")
        return store.code_of("my_methods.penalty", module.penalty)

    yield written
    for name in set(sys.modules) - before:
        del sys.modules[name]


WAYS = {  # to reach the function f of a helper; its other files
    "by name": "from helper import f\n" + USES.format("f(weight)"),
    "by another name": "from helper import f as g\n" + USES.format("g(weight)"),
    "as an attribute": "import helper\n" + USES.format("helper.f(weight)"),
    "with a star": "from helper import *\n" + USES.format("f(weight)"),
    "inside a function": "def penalty(weight):\n    import helper\n    return helper.f(weight)\n",
    "inside a lambda's function": "def g():\n    from helper import f\n    return f\npenalty = lambda w: g()(w)\n",
    "by a partial": "from functools import partial\nimport helper\npenalty = partial(helper.f)\n",
    "by a closure": "import helper\ndef made(f):\n    def penalty(w):\n        return f(w)\n    return penalty\n"
    "penalty = made(helper.f)\n",
    "as a base": "from helper import f\nclass penalty(type('Base', (), {'f': f})):\n    pass\n",
    "where it may be missing": "try:\n    import helper\nexcept ImportError:\n    helper = None\n"
    + USES.format("weight"),
    "by its name as text": "from importlib import import_module\n" + USES.format("import_module('helper').f(weight)"),
    "by a name that is made up": "import importlib\nNAME = 'hel' + 'per'\n"
    + USES.format("importlib.import_module(NAME).f(weight)"),
    "by the loaded modules": "import sys\n" + USES.format("sys.modules['helper'].f(weight)"),
    "by a text of it": "from pathlib import Path\nTEXT = Path(__file__).with_name('helper.py').read_text()\n"
    + USES.format("weight"),
    "by another module": "import between\n" + USES.format("between.g(weight)"),
    "moved here": "from helper import f as penalty\n",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_helper_counts_however_it_is_reached(way, written):
    texts = {"my_methods": WAYS[way], "between": "import helper\ndef g(x):\n    return helper.f(x)\n"}
    first = written({**texts, "helper": HELPER})
    assert written({**texts, "helper": HELPER}) == first
    assert written({**texts, "helper": HELPER.replace("2", "3")}) != first


def test_whole_modules_count_but_for_comments_and_docstrings(written):
    helper = '"""Says."""\nSLOPE = 0.1\nTABLE = {"a": [1]}\ndef f(x):\n    """Says."""\n    return x * SLOPE\n'
    own = {"my_methods": "import helper\nEPS = 1e-3\n" + USES.format("helper.f(weight) / EPS")}
    first = written({**own, "helper": helper})
    assert set(first) == {"my_methods", "helper"}
    assert written({**own, "helper": helper.replace("Says", "Tells") + "# more\n\n"}) == first
    for old, new in (("0.1", "0.2"), ("[1]", "[2]"), ("x * SLOPE", "x + SLOPE")):
        assert written({**own, "helper": helper.replace(old, new)}) != first
    assert written({"my_methods": own["my_methods"].replace("1e-3", "1"), "helper": helper}) != first


PACKAGE = {
    "my_methods/__init__": "from .net import penalty\n",
    "my_methods/net": "from . import layers\nfrom .sub.deep import g\n" + USES.format("g(layers.f(weight))"),
    "my_methods/layers": HELPER,
    "my_methods/sub/__init__": "FACTOR = 1\n",
    "my_methods/sub/deep": "from ..layers import f\ndef g(x):\n    return f(x)\n",
    "my_methods/unused": "A = 1\n",
}


def test_packages_count_by_the_files_that_are_imported(written):
    first = written(PACKAGE)
    modules = {"my_methods", "my_methods.net", "my_methods.layers", "my_methods.sub", "my_methods.sub.deep"}
    assert set(first) == modules
    for name in PACKAGE:
        changed = written({**PACKAGE, name: PACKAGE[name] + "MORE = 2\n"})
        assert (changed == first) == (name == "my_methods/unused")
        written(PACKAGE)


def test_a_package_that_loads_its_modules_by_text_counts_whole(written):
    lazy = "import importlib\ndef __getattr__(name):\n    return importlib.import_module('.' + name, __name__)\n"
    own = {**PACKAGE, "my_methods/__init__": lazy + "from .net import penalty\n"}
    first = written(own)
    assert "my_methods.unused" in first
    assert written({**own, "my_methods/unused": "A = 2\n"}) != first


def test_what_is_imported_later_changes_nothing(written):
    texts = {"my_methods": "def penalty(weight):\n    import helper\n    return helper.f(weight)\n", "helper": HELPER}
    first = written(texts)
    sys.modules["my_methods"].penalty(1)
    assert "helper" in sys.modules and store.code_of("my_methods.penalty", sys.modules["my_methods"].penalty) == first


def test_the_code_that_runs_counts_and_not_what_was_written_since(written, tmp_path):
    first = written({"my_methods": USES.format("weight")})
    (tmp_path / "my_methods.py").write_text(USES.format("weight + 1"))
    module = sys.modules["my_methods"]
    assert store.code_of("my_methods.penalty", module.penalty) == first
    importlib.invalidate_caches()
    importlib.reload(module)
    assert store.code_of("my_methods.penalty", module.penalty) != first


def test_installed_packages_count_by_version_and_those_that_a_result_names_not_at_all(written):
    imports = "import torch\nimport numpy\nimport os\nimport rich.table\n"
    found = written({"my_methods": imports + USES.format("weight")})
    assert set(found) == {"my_methods", "rich"}
    from importlib.metadata import version

    assert found["rich"].startswith(f"rich {version('rich')} ")
    assert store.code_of("torch.optim.Adam", torch.optim.Adam) == {}


def test_files_without_source_and_without_grammar_count_by_their_bytes(written, tmp_path):
    own = {"my_methods": "try:\n    import helper\nexcept SyntaxError:\n    pass\n" + USES.format("weight")}
    first = written({**own, "helper": "print 1\n"})
    assert written({**own, "helper": "print 2\n"}) != first


def test_what_was_typed_in_counts_with_all_that_it_names(monkeypatch):
    def typed(text):
        module = type(sys)("typed_in")
        monkeypatch.setitem(sys.modules, "typed_in", module)
        exec(text, vars(module))
        return store.code_of("typed_in.penalty", module.penalty)

    text = "EPS = 0.1\ndef f(x):\n    return x * 2\nclass Net:\n    def forward(self, x):\n        return f(x) / EPS\n"
    first = typed(text + "penalty = Net\n")
    assert typed(text + "penalty = Net\n") == first
    for old, new in (("0.1", "0.2"), ("x * 2", "x * 3"), ("f(x) /", "f(x) *")):
        assert typed(text.replace(old, new) + "penalty = Net\n") != first


# --- our own ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked():
    from sparsity import config

    return config.read(compose(["model=mlp", "model.factory.hidden=[8]"])[0])


ROOMS = sorted(
    {
        path.relative_to(ROOT / "sparsity").with_suffix("").parts[0]
        for path in (ROOT / "sparsity").rglob("*.py")
        if path.parent.name != "experiment"
    }
)
FIRST = {
    "regularizers": "regularize",
    "pruning": "prune",
    "compaction": "finetune",
    "shrinking": None,  # hs is a penalty
    "budgets": None,  # no budget is given
    "limits": None,
    "accounting": None,
    "artifact": None,
}  # the first stage that a change reaches


@pytest.mark.parametrize("room", [*ROOMS, "experiment.members", "experiment.stored", "experiment.record"])
def test_a_change_of_our_code_reaches_the_stages_whose_numbers_it_can_change(room, checked, monkeypatch):
    before = keys.stage_keys(checked, "images", "cpu", "float32")
    own = code._our_files()
    edited = {name: f"{text}." if room in (name, name.partition(".")[0]) else text for name, text in own.items()}
    assert edited != own
    monkeypatch.setattr(code, "_our_files", lambda: edited)
    after = keys.stage_keys(checked, "images", "cpu", "float32")
    same = [stage for stage in checked.stages if before[stage].key == after[stage].key]
    first = FIRST.get(room, "pretrain")
    if room in keys.NO_NUMBERS or room == "weights" or first is None:  # no weights are given
        assert same == checked.stages
    else:
        assert same == checked.stages[: checked.stages.index(first)]


USED = [  # what a run is, a room, and the first stage that a change of it reaches
    ((), "compaction", "finetune"),
    (("recipe.finetune.hold=masks",), "compaction", None),
    (("budget.nonzero=9",), "budgets", "prune"),
    (("budget.nonzero=9",), "limits", "prune"),
    (("budget.macs=9",), "accounting", "prune"),
    (("budget.macs=9",), "artifact", None),
    (("budget.bytes=9",), "artifact", "prune"),
    (("recipe=iterative", "rounds=2", "budget.nonzero=9"), "budgets", "prune"),
    (("recipe=iterative", "rounds=2"), "regularizers", "regularize"),
    (("recipe=magnitude",), "regularizers", None),
    (("recipe=magnitude", "reg=l1"), "regularizers", None),
    (("recipe=at_init",), "pruning", "prune"),
    (("recipe=gradual",), "pruning", "train"),
    (("recipe=lottery", "rounds=1"), "pruning", "prune"),
]


@pytest.mark.parametrize(("overrides", "room", "first"), [*USED[1:4], *slow(*USED[:1], *USED[4:])], ids=str)
def test_code_counts_in_the_stages_that_use_it_and_in_later_ones(overrides, room, first, monkeypatch):
    from sparsity import config

    run = config.read(compose(overrides)[0], typed=overrides)
    before, own = keys.stage_keys(run, "images", "cpu", "float32"), code._our_files()
    edited = {name: f"{text}." if name.partition(".")[0] == room else text for name, text in own.items()}
    monkeypatch.setattr(code, "_our_files", lambda: edited)
    after = keys.stage_keys(run, "images", "cpu", "float32")
    names = [stage.name for stage in run.recipe]
    changed = [name for name in names if before[name].key != after[name].key]
    assert changed == ([] if first is None else names[names.index(first) :])


def test_rooms_that_change_no_number_are_known_by_name():
    named = {name.partition(".")[0] for name in keys.NO_NUMBERS if name != "__init__"}
    parts = [name.split(".") for name in keys.NO_NUMBERS if name.startswith("experiment.")]
    assert all((ROOT / "sparsity" / room / f"{file}.py").is_file() for room, file in parts)
    assert named <= {*ROOMS, "experiment"} and not set(keys.NO_NUMBERS) & set(keys.OF_SOME)
    needed = {"tensors", "population", "data", "capture", "step", "training", "schedules", "stages", "models"}
    assert not needed & {*keys.NO_NUMBERS, *keys.OF_SOME}


def test_code_that_counts_for_some_stages_is_imported_where_they_are_run_alone():
    root = ROOT / "sparsity"
    files = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    told = {name: {name[:-3].replace("/", "."), name.partition("/")[0].removesuffix(".py")} for name in files}
    files = {name: text for name, text in files.items() if not told[name] & {*keys.NO_NUMBERS}}
    for room in keys.OF_SOME:
        found = {name for name, text in files.items() if f"from sparsity.{room} import" in text}
        known = {"stages/training.py", "stages/pruning.py", "experiment/checks.py"}
        also = {"accounting": {"budgets.py"}, "limits": {"budgets.py"}, "regularizers": {"stages/regularizing.py"}}
        also |= {"pruning": {"stages/regularizing.py", "experiment/keys.py"}}
        also |= {"budgets": {"stages/adapting.py"}}
        also |= {"limits": {"budgets.py", "stages/adapting.py", "stages/sizing.py", "experiment/keys.py"}}
        also["accounting"] |= {"stages/sizing.py"}
        assert found <= known | also.get(room, set()), room
