"""What is trained: the networks and data of the project's own loop, and how its epochs are told."""

from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from benchmarks.turns import Tell
from sparsity import config, data, models, regularizers
from sparsity.capture import Way
from sparsity.experiment.machine import machine
from sparsity.experiment.plan import planned
from sparsity.experiment.precision import precision_of
from sparsity.kernels import kernels_of
from sparsity.population import Population, stack
from sparsity.schedules import learning_rate
from sparsity.stages import Context
from sparsity.stages.regularizing import total_penalty
from sparsity.stages.training import pays, way_of
from sparsity.step import Form, Penalty
from sparsity.training import Epoch, Loop, Watcher, train

NETWORKS = ("lenet300", "lenet5")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZE = 100
DECAY = 1e-4
FULL_EPOCH = 60_000  # images; seconds are given for so many
LONG_STAGE = 250 * FULL_EPOCH // BATCH_SIZE  # steps of pretraining by the paper's schedule
WITHOUT_END = 1_000_000  # epochs


@dataclass(frozen=True)
class Setting:
    """What the command was given."""

    data_root: str
    images: int  # of a measured epoch
    rounds: int
    quick: bool  # a few cases, to see that all works
    random: bool  # random images instead of MNIST
    device: str  # of the populations
    networks: tuple[str, ...]

    def per_epoch(self, seconds: float) -> float:
        """The seconds of 60,000 images, from those of a measured epoch."""
        return seconds * FULL_EPOCH / self.images

    @property
    def steps(self) -> int:
        """The steps of a measured epoch."""
        return data.count_batches(self.images, BATCH_SIZE)


def splits(setting: Setting, *, validated: bool = False) -> data.Splits:
    """So many images of MNIST to train on; validated: validation and test in the proportions of the whole, too."""
    whole = data.split(_source(setting), validation=0, seed=0, normalize=None)
    taken = replace(whole, train=_first(whole.train, 0, setting.images))
    if not validated:
        return taken
    training, held_out = setting.images * 11 // 12, setting.images // 12
    parts = {"train": _first(taken.train, 0, training), "validation": _first(taken.train, training, held_out)}
    return replace(taken, **parts, test=_first(whole.test, 0, setting.images // 6))


def _source(setting: Setting) -> data.Source:
    if not setting.random:
        return data.mnist(root=setting.data_root)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
        return images, torch.arange(count) % 10

    return data.Source(drawn(setting.images), drawn(setting.images), 10)


def _first(images: data.Images, start: int, count: int) -> data.Images:
    return images.take(torch.arange(start, min(start + count, len(images))))


def population(network: str, members: int = 1, device: str = "cpu") -> Population:
    """Untrained members of a network for MNIST."""
    return stack([module(network, seed) for seed in range(members)], device)


def module(network: str, seed: int = 0) -> torch.nn.Module:
    """A network for MNIST."""
    return models.build(getattr(models, network), (1, 28, 28), 10, seed=seed)


def penalty(reg: str, members: Population, decay: float = DECAY) -> Penalty | None:
    """The penalty of every member, on the parameters that the regularizer's YAML applies it to."""
    if reg == "none":
        return None
    kinds = ("weight", "bias") if reg == "hs" else ("weight",)
    names = [name for name, layout in members.layouts.items() if layout.kind in kinds]
    function = getattr(regularizers, reg)
    total = total_penalty(function, members.layouts, names)
    decays = torch.full((members.num_members,), decay, device=members.device)
    return Penalty(total, decays, {}, form=Form(function, names))


def loop(way: Way, precision: str, epochs: int = WITHOUT_END, lr: float = 1e-3, shape: str = "constant") -> Loop:
    """Adam, at a constant learning rate unless the shape says otherwise."""
    rate = partial(learning_rate, lr=lr, shape=shape, warmup=0.0)
    return Loop(epochs, BATCH_SIZE, rate, partial(torch.optim.Adam, fused=True, lr=lr), PRECISIONS[precision], way)


def with_kernels(plan: Loop, members: Population, images: data.Splits) -> Loop:
    """The loop with the network's kernels, if that is how its steps are computed."""
    if plan.way != "kernels":
        return plan
    kernels = kernels_of(members, images, plan.optimizer([torch.zeros(1, requires_grad=True)]))
    assert kernels is not None, "needs a compiler"
    return replace(plan, kernels=kernels)


def default(network: str, num_steps: int = LONG_STAGE, device: str = "cpu", *, reg: str = "hs") -> tuple[Way, str]:
    """What `step=auto precision=auto` take for a stage of so many steps, regularizing unless reg is none."""
    run = config.read(config.compose([f"model={network}", f"reg={reg}"])[0])
    members, model = population(network, device=device), run.model.factory.target
    stage = next(each for each in planned([run]) if (each.regularizers is None) == (reg == "none"))
    context = Context(splits=None, seeds=[0], graph=None, step="auto", model=model)
    if device == "cpu" and pays(members):
        return "kernels", "float32"
    targets = [model, run.optimizer.target]
    return way_of(context, members, num_steps, targets, bool(stage.regularizers)), precision_of(run, members.device)


def torch_precision() -> str:
    """The precision of this machine's CPU where torch computes the steps."""
    return precision_of(config.read(config.compose([])[0]), torch.device("cpu"))


class Told(Watcher):
    """Tells the seconds of every epoch, and the bytes that a population has taken since `before`."""

    def __init__(self, tell: Tell, device: str = "cpu"):
        self.tell, self.device = tell, device
        self.before = bytes_taken(device)

    def epoch(self, row: Epoch) -> None:
        """Tells one epoch, and waits for the next turn."""
        if row.epoch:
            self.tell(seconds=row.seconds, bytes=bytes_taken(self.device) - self.before)


def bytes_taken(device: str) -> int:
    """The most that a GPU held so far, or what the process holds now."""
    return torch.cuda.max_memory_allocated(device) if device == "cuda" else psutil.Process().memory_info().rss


def our_epochs(
    tell: Tell,
    setting: Setting,
    network: str,
    reg: str,
    way: Way,
    precision: str,
    members: int = 1,
    device: str = "cpu",
) -> None:
    """Tells the seconds of epoch after epoch of the project's loop; what it has recorded, it keeps."""
    with machine(None):
        images = splits(setting).to(device)
        watcher = Told(tell, device)
        trained = population(network, members, device)
        generators = [torch.Generator().manual_seed(seed) for seed in range(members)]
        plan = with_kernels(loop(way, precision), trained, images)
        train(trained, images, plan, generators, penalty=penalty(reg, trained), watcher=watcher)
