"""Seconds per epoch of training on a CPU beside the plain loop."""

import contextlib
import os
import subprocess
import sys
import tempfile
from statistics import median

from benchmarks.floor import Rates, work
from benchmarks.plain import plain_epochs
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import BATCH_SIZE, NETWORKS, PRECISIONS, Setting, default, module, our_epochs
from benchmarks.turns import Contender, Tell, Turns

PART = "epochs"
UNIT = "s / 60,000 images"
WAYS = ("eager", "recorded", "compiled")
CASES = [(network, reg) for network in NETWORKS for reg in ("none", "hs", "group_hs")]
FEW_CASES = [("lenet300", "hs")]
TARGETS = {("lenet300", "hs"): 12, ("lenet5", "hs"): 6, ("lenet5", "group_hs"): 5}
KERNELS = "kernels float32"


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """An epoch of each network and regularizer, by every way in both precisions, interleaved with the plain loop."""
    report.heading("an epoch on the CPU; ratio: plain loop / ours")
    cases = FEW_CASES if setting.quick else CASES
    for network, reg in cases:
        if network in setting.networks:
            _case(setting, report, rates, network, reg)
    report.heading("what compiling takes once, in a process that has not compiled before")
    for network, reg in [] if setting.quick else TARGETS:
        if (network, reg) in cases and network in setting.networks:
            _compiling(setting, report, network, reg)
    if not setting.quick:
        report.heading("an epoch while another process keeps each core busy; ratio: busy / idle")
        _busy(setting, report)


def _case(setting: Setting, report: Report, rates: Rates, network: str, reg: str) -> None:
    chosen = default(network, reg=reg)
    own = {f"{way} {precision}": (way, precision) for precision in PRECISIONS for way in WAYS}
    own[KERNELS] = ("kernels", "float32")
    if setting.quick:
        own = {name: own[name] for name in ("recorded float32", KERNELS)}
    calls = {name: (our_epochs, setting, network, reg, *how) for name, how in own.items()}
    turns = Turns({"plain": (plain_epochs, setting, network, reg), **calls}, setting.rounds)
    step = work(module(network), (1, 28, 28), BATCH_SIZE, penalised=reg != "none")
    for name in turns.first:
        precision = own[name][1] if name in own else "float32"
        is_default = own.get(name) == chosen
        target = TARGETS.get((network, reg)) if is_default else None
        report.add(
            Figure(
                PART,
                f"{network} {reg}: {name}{' (auto, of a long stage)' if is_default else ''}",
                setting.per_epoch(turns.median(name)),
                UNIT,
                ratio=turns.ratio("plain", name) if name in own else None,
                target=target and Target(target, at_least=True),
                floor=setting.per_epoch(setting.steps * step.floor(rates, precision)),
                details={"seconds": turns.all(name), "one_off_seconds": turns.one_off(name)},
            )
        )
    for name in (" ".join(how) for how in own.values() if how[0] != "eager"):
        report.add(Figure(PART, f"{network} {reg}: {name}, once a stage", turns.one_off(name), "s"))


def _busy(setting: Setting, report: Report) -> None:
    """The time of an epoch beside a process a core that does nothing else than compute, against an idle machine."""
    for way, precision in (("kernels", "float32"), ("compiled", "bfloat16")):
        contender = Contender(our_epochs, setting, "lenet300", "hs", way, precision)
        contender.turn()
        idle = median(contender.turn()["seconds"] for _ in range(setting.rounds))
        with contextlib.ExitStack() as stack:
            for _ in range(os.cpu_count() or 1):
                burner = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                stack.callback(burner.kill)
            busy = median(contender.turn()["seconds"] for _ in range(setting.rounds))
        contender.stop()
        target = Target(MOST_BUSY) if way == "kernels" else None
        name = f"lenet300 hs: {way} {precision}, on busy cores"
        report.add(Figure(PART, name, setting.per_epoch(busy), UNIT, ratio=busy / idle, target=target))


MOST_BUSY = 2.5  # times the epoch of an idle machine


def _compiling(setting: Setting, report: Report, network: str, reg: str) -> None:
    """Two processes with one cache of the compiler's, which is empty for the first."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "filled"):
            contender = Contender(compiling, setting, network, reg, default(network)[1], cache)
            once = contender.turn()["seconds"] - contender.turn()["seconds"]
            contender.stop()
            report.add(Figure(PART, f"{network} {reg}: compiled, cache {state}", once, "s"))


def compiling(tell: Tell, setting: Setting, network: str, reg: str, precision: str, cache: str) -> None:
    """Tells the seconds of epochs by compiled steps, with a cache in the folder given."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    our_epochs(tell, setting, network, reg, "compiled", precision)
