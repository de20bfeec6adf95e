"""Command lines at random, of keys and choices that exist, misspelt ones, and values of every kind.

None ends in a traceback or hangs; what is refused is one line with status 2. `make fuzz` tries 10,000.
"""

import os
import tempfile

import pytest
from command_lines import CommandLines
from conftest import ROOT, choices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sparsity import config

EXAMPLES = int(os.environ.get("SPARSITY_FUZZ", "0"))  # 0: the short form, the same each time
GROUPS = [path.name for path in sorted((ROOT / "conf").iterdir()) if path.is_dir() and path.name != "hydra"]
ELSEWHERE = ("joblib", "ray", "ray_aws", "submitit_local", "submitit_slurm")  # launchers that start processes


def _keys(node, before=""):
    for name, inner in node.items():
        yield f"{before}{name}"
        if isinstance(inner, dict):
            yield from _keys(inner, f"{before}{name}.")


def _known_keys():
    common = ["data=image_folder", "model=mlp", "reg=transformed_l1", "search=pareto"]
    composed, own = config.compose(common)
    recipes = [OmegaConf.to_container(config.compose([f"recipe={name}"])[0].recipe) for name in ("lottery", "gradual")]
    plain = {key: node for key, node in OmegaConf.to_container(composed).items() if key != "hydra"}
    plain["recipe"] = {name: node for each in recipes for name, node in each.items()}
    hydras = OmegaConf.to_container(own)
    for described in ("help", "hydra_help", "runtime", "overrides", "job_logging", "hydra_logging"):
        hydras.pop(described)
    return [*_keys(plain)] * 3 + [*_keys(hydras, "hydra.")]


CHOICES = [f"{group}={choice}" for group in GROUPS for choice in choices(group)]
CHOICES += ["hydra/launcher=basic", "hydra/launcher=population", "hydra/sweeper=basic", "hydra/sweeper=search"]
VALUES = [
    *("0", "1", "2", "-1", "0.5", "1e-3", "1e300", "1e400", "-0.0", "nan", "inf", "-inf", "1_000", "0x1F", "9" * 30),
    *(
        "true",
        "false",
        "null",
        "None",
        "???",
        "",
        "''",
        '""',
        "[]",
        "{}",
        "[1,2]",
        "[nan]",
        "{a:1}",
        "[[1]]",
        "[{a:b}]",
    ),
    *("abc", "a b", "é", "a=b", "a,b", "1,2", "1,", ",", "[1", "1]", "{a", "(", "'", '"', "\\", "%", "$HOME", "#", "~"),
    *("${seed}", "${nope}", "${seed", "${oc.env:NOPE}", "${hydra:job.num}", "${now:%Y}", "${nope:1}", "${.x}"),
    *("range(1,3)", "range(0)", "interval(0,1)", "choice(1,2)", "choice()", "tag(log,interval(1e-5,1))", "glob(*)"),
    *("int(abc)", "sort(3,1)", "shuffle(1,2)", "extend_list(1)", "nope(1)", "json_str({a:1})", "x" * 300, "[" * 50),
    *("[pretrain]", "[prune]", "[weight]", "[fc1]", "sparsity.run", "sparsity.regularizers.l1", "os.system"),
    *("[pretrain,{repeat:2,stages:[prune,finetune]}]", "[{repeat:0,stages:[prune]}]", "{repeat:2,stages:[prune]}"),
    *("pretrain@1", "start", "zeros", "{compression:5}", "{epochs:7}", "${schedule.finetune}", "${recipe.prune}"),
    *("/dev/null/x", "nope/there", "*", "a/b", "hs", "mlp", "auto", "cuda:99"),
]
FLAGS = [
    *(
        ["-m"],
        ["-m"],
        ["-m"],
        ["--multirun"],
        ["--run"],
        ["--foo"],
        ["-x"],
        ["--help"],
        ["--hydra-help"],
        ["--resolve"],
    ),
    *(
        ["--cfg", "job"],
        ["--cfg", "all", "--resolve"],
        ["--cfg", "nope"],
        ["--cfg"],
        ["--info"],
        ["--info", "defaults"],
    ),
    *(["--config-name", "nope"], ["--config-dir", "nope"], ["--config-dir", "."], ["--config-path", "nope"]),
    *(["--package", "reg", "--cfg", "job"], ["--package", "nope", "--cfg", "job"], ["--experimental-rerun", "nope"]),
]
NO_FOLDERS = st.characters(exclude_characters="/.~$\0", exclude_categories=("Cs",))


@st.composite
def _misspelt(draw, texts):
    """A text with a letter too many, too few, another, or two changed over."""
    text = draw(texts)
    place = draw(st.integers(0, len(text) - 1))
    kind = draw(st.integers(0, 3))
    letter = draw(st.sampled_from("aeinrst_.-@:/ "))
    if kind == 0:
        return text[:place] + text[place + 1 :]
    if kind == 1:
        return text[:place] + letter + text[place:]
    if kind == 2:
        return text[:place] + letter + text[place + 1 :]
    return text[:place] + text[place : place + 2][::-1] + text[place + 2 :]


@st.composite
def _overrides(draw):
    keys = st.sampled_from(_overrides.keys)
    chosen = st.sampled_from(CHOICES)
    values = st.one_of(st.sampled_from(VALUES), st.sampled_from(VALUES), st.text(NO_FOLDERS, max_size=8))
    kind = draw(st.integers(0, 9))
    if kind < 4:
        return f"{draw(keys)}={draw(values)}"
    if kind == 4:
        return f"{draw(st.sampled_from(['+', '++', '~']))}{draw(keys)}={draw(values)}"
    if kind == 5:
        return f"{draw(_misspelt(keys))}={draw(values)}"
    if kind == 6:
        return draw(st.one_of(chosen, _misspelt(chosen)))
    if kind == 7:
        return f"{draw(st.sampled_from(GROUPS))}{draw(st.sampled_from(['', '@x', '/x']))}={draw(values)}"
    if kind == 8:
        return draw(st.sampled_from(["~", "+", "", "-"])) + draw(st.one_of(keys, chosen))
    return draw(st.text(NO_FOLDERS, max_size=12))


@st.composite
def command_lines(draw):
    typed = [draw(_overrides()) for _ in range(draw(st.sampled_from([1, 1, 1, 2, 2, 3])))]
    flags = draw(st.one_of(st.just([]), st.just([]), st.sampled_from(FLAGS)))
    searches = any(text.startswith(("search=", "hydra/sweeper=s")) for text in typed)
    trials = ["hydra.sweeper.n_trials=2"] if searches and not any("n_trials" in text for text in typed) else []
    return ["data=digits", *trials, *typed, *flags]


def is_told_well(done):
    """Whether a command line was accepted, or refused in one line with status 2."""
    lines = [line for line in done["stderr"].splitlines() if not line.startswith("warning: ")]
    if done["status"] is None or "Traceback" in done["stderr"] or ("Error:" in done["stderr"] and not lines):
        return False
    return done["status"] == 0 or (done["status"] == 2 and len(lines) == 1 and bool(lines[0].strip()))


@pytest.fixture(scope="module")
def program():
    _overrides.keys = _known_keys()
    running = CommandLines()
    yield running
    running.close()


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(arguments=command_lines())
def test_no_command_line_ends_in_a_traceback(program, arguments):
    with tempfile.TemporaryDirectory() as folder:
        done = program.run(arguments, folder)
    assert is_told_well(done), f"{arguments}: status {done['status']}\n{done['stderr'][-3000:]}"
