"""What the tests share: the YAMLs that they find, layers of every kind, and a run on small data."""

import copy
import functools
import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from torch import nn

FINISHED = {
    "format": 2,
    "accuracy": {"final": {"validation": 0.9, "test": 0.9}},
    "compression": {"weights": 2.0},
    "macs": {"pruned": 1},
    "nonzero": {"weights": 1},
    "keys": {},
    "files": {},
}


def put_finished(folder):
    """A finished run of no stages, in a few words."""
    from sparsity.results.sealed import sealed

    (folder / "result.json").write_text(json.dumps(sealed(FINISHED)))


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

Plugins.instance()
torch.set_num_threads(1)  # the networks are tiny, and tests run beside each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: theirs would wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --by-kernels`: training by kernels of every network that there are some for, however short it is."""
    parser.addoption("--by-kernels", action="store_true", help="training by kernels wherever there are some")


def pytest_collection_finish() -> None:
    """Leaves what is imported out of the collection of garbage: a twelfth of the time of the quick tests."""
    gc.freeze()


def choices(group: str) -> list[str]:
    """The YAMLs of a group, which is how a new method comes under the tests."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}


@functools.cache
def _composed(overrides: tuple[str, ...]) -> tuple:
    from sparsity import config

    return config.compose(overrides)


def compose(overrides: list[str] | tuple[str, ...]) -> tuple:
    """What `config.compose` gives, in a fifth of the time: Hydra composes each choice of groups once.

    What is typed for their keys is put in by the function that Hydra itself does it with, into a copy.
    """
    from sparsity import config
    from sparsity.errors import ConfigError

    def is_choice(text: str) -> bool:
        return text.lstrip("+~").partition("=")[0].partition("/")[0].partition("@")[0] in GROUPS

    if any(text.startswith("hydra") for text in overrides):  # YAMLs of a test's own above all
        return config.compose(overrides)
    own, hydra = copy.deepcopy(_composed(tuple(text for text in overrides if is_choice(text))))
    try:
        parsed = OverridesParser.create().parse_overrides([text for text in overrides if not is_choice(text)])
        ConfigLoaderImpl._apply_overrides_to_config(parsed, own)
    except Exception as error:  # as `config.compose` takes it
        raise ConfigError(config.said(error, overrides)) from error
    return own, hydra


def slow(*values: object) -> list:
    """Parameters of which the quick tests leave out all."""
    each = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.slow) for value in each]


def some_slow(values: list[str], *slow_ones: str) -> list:
    """Parameters of which the quick tests leave out some, that are much like others; a new one is never left out."""
    return [value for value in values if value not in slow_ones] + slow(*(v for v in values if v in slow_ones))


def layers() -> dict[str, nn.Module]:
    """One module of every layer kind that a weight comes in."""
    return {
        "linear": nn.Linear(6, 4),
        "conv1d": nn.Conv1d(3, 4, 3),
        "conv2d": nn.Conv2d(3, 4, (2, 3)),
        "conv3d": nn.Conv3d(2, 3, 2),
        "grouped": nn.Conv2d(6, 4, 3, groups=2),
        "depthwise": nn.Conv2d(4, 8, 3, groups=4),
        "transposed": nn.ConvTranspose2d(3, 4, 2),
        "transposed_grouped": nn.ConvTranspose1d(6, 4, 3, groups=2),
    }


def rule_node(name: str = "threshold", *, unit: object = None, **more: object):
    """The node of a shipped rule, with other settings; unit: a function in place of its unit's."""
    from dataclasses import replace

    from sparsity.nodes import Call

    node = shipped_rule(name)[1]
    if unit is not None:
        node = replace(node, unit=replace(node.unit, function=Call("prune.unit", unit.__name__, unit, {})))
    return replace(node, apply_to=["weight"], **more)


@functools.cache
def shipped_rule(*overrides: str) -> tuple:
    """The sensitivity and the node of a rule that `conf/` holds: of its name, and of other choices for its parts."""
    from sparsity import config

    name, *others = overrides
    run = config.read(compose([f"prune={name}", *others])[0])
    return run.sensitivity, run.prune


def context_of(graph: object = None, splits: object = None, seeds: tuple = (0,), **more: object):
    """What stages are given beside their population."""
    from types import SimpleNamespace

    from sparsity.stages import Context

    return Context(splits=splits, seeds=list(seeds), graph=graph or SimpleNamespace(units=None), **more)


@pytest.fixture(autouse=True)
def by_kernels(request, monkeypatch) -> None:
    """What `--by-kernels` asks for: `step=auto` takes them wherever it can."""
    if request.config.getoption("--by-kernels"):
        monkeypatch.setattr("sparsity.stages.training.WORTH_BUILDING", 0)
        monkeypatch.setattr("sparsity.stages.training.pays", lambda population: True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Runs every test in a folder of its own, so that what it leaves, a store above all, is of no use to another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # whatever the width of the terminal that the tests are started in


@pytest.fixture
def mnist_root() -> str:
    """The folder with real MNIST; tests that need it skip where SPARSITY_DATA does not name one."""
    root = os.environ.get("SPARSITY_DATA")
    if not root or not (Path(root) / "MNIST").is_dir():
        pytest.skip("needs real MNIST: SPARSITY_DATA names no folder that holds it")
    return root


@pytest.fixture
def run(tmp_path):
    """Runs the pipeline on digits with the smoke schedule, in a folder of its own, no store; overrides come last."""
    counter = iter(range(1000))

    def run(*overrides: str) -> dict:
        import sparsity

        given = {override.partition("=")[0] for override in overrides}
        defaults = {"data": "digits", "schedule": "smoke", "store": "null"}
        defaults["hydra.run.dir"] = str(tmp_path / f"run{next(counter)}")
        added = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        return sparsity.run([*added, *overrides])

    return run
