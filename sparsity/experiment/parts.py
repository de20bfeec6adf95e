"""What a population is made of: device, data, members and the ingredients of its stages, each checked."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparsity import config as schema
from sparsity import console, stages, store
from sparsity.capture import Way, is_known
from sparsity.config import Run
from sparsity.data import Files, Images, Source, Splits, as_source, count_batches, file_state, split, state_of
from sparsity.errors import ConfigError, DataError, SparsityError, reason
from sparsity.evaluation import image_bytes
from sparsity.experiment.precision import PRECISIONS, precision_of
from sparsity.graph import Layer, Units
from sparsity.memory import free_bytes
from sparsity.models import build, check_fits
from sparsity.population import Population, stack
from sparsity.schedules import learning_rate
from sparsity.stages import Ingredients, derived_seed
from sparsity.step import Penalty, can_be_recorded, convolves, is_elementwise, is_finite, try_step
from sparsity.tensors import Layout, from_view, normalised, to_view
from sparsity.training import Loop, train
from sparsity.weights import fill, read_states

log = logging.getLogger("sparsity")


def device_of(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend refuses in its own way
        there = ["auto", "cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConfigError(f"device={name} is not there: this machine has {', '.join(there)}") from error
    if device.type == "meta":
        raise ConfigError("device=meta computes nothing: take auto or cpu")
    return device


@contextlib.contextmanager
def machine(threads: int | None) -> Iterator[None]:
    """The process as training wants it: denormals flushed (sparsity training makes many), threads as asked."""
    before, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or before)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
        torch.backends.cudnn.deterministic = deterministic


class _Loaded:
    """Remembers the data that was asked for last, for as long as it lies on disk as it did."""

    def __init__(self):
        self.settings: str | None = None
        self.places: Sequence[str] = ()
        self.state: list[tuple] = []
        self.found: tuple[Splits, str] | None = None

    def get(self, run: Run, in_sweep: bool) -> tuple[Splits, str]:
        """The data of a run, and its fingerprint; in_sweep: of a member of a sweep."""
        data, loader = run.data, run.data.loader
        numbers = dataclasses.asdict(replace(data, loader=None)) | {"loader": [loader.target, loader.numbers]}
        settings = json.dumps(numbers, default=str)
        if self.found is None or settings != self.settings or state_of(self.places) != self.state:
            self.found = None  # makes room for the next
            source = _source(run)
            self.settings, self.places = settings, source.places or _paths_in(loader.numbers)
            self.state = state_of(self.places)
            splits = split(source, validation=data.validation, seed=data.validation_seed, normalize=data.normalize)
            found = splits, _fingerprint(splits)
            is_known = bool(source.places) or loader.target.startswith("sparsity.")
            # nobody knows what a loader of the user's own has read: it is asked again, but not by every member
            self.found = found if is_known or in_sweep else None
            return found
        return self.found


_LOADED = _Loaded()


def load_data(run: Run, in_sweep: bool = False) -> tuple[Splits, str]:
    """The run's data, split, and its fingerprint; the last data asked for is kept for the next member of a sweep."""
    return _LOADED.get(run, in_sweep)


def _source(run: Run) -> Source:
    name = run.name.get("data", run.data.loader.target)
    try:
        with console.waiting(f"reading data={name}"):
            return as_source(run.data.loader.partial()())
    except SparsityError:
        raise
    except Exception as error:  # whatever a loader of the user's own may raise
        raise DataError(f"data={name} cannot be loaded: {reason(error)}") from error


def _paths_in(numbers: Mapping[str, object]) -> list[str]:
    """The files and folders that a loader of the user's own was given."""
    given = [os.path.expanduser(value) for value in numbers.values() if isinstance(value, str)]
    return [path for path in given if os.path.exists(path)]


def _fingerprint(splits: Splits) -> str:
    """What a stage may learn of the data: every image and label, the split, and how pixels are scaled."""
    sets = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    digests = {name: part and _set_digest(part) for name, part in sets.items()}
    return store.key_of({**digests, "mean": splits.mean, "std": splits.std, "num_classes": splits.num_classes})


def _set_digest(part: Images | Files) -> str:
    if isinstance(part, Images):
        return store.digest({"images": part.images, "labels": part.labels})
    if part.digests is not None:
        content = store.digest({"digests": part.digests, "labels": part.labels})
        return store.key_of({"content": content, "read": repr(part.read)})
    listed = [file_state(path) for path in part.paths]  # of a loader of the user's own
    return store.key_of({"files": listed, "labels": part.labels.tolist(), "shape": list(part.shape)})


def first_population(runs: Sequence[Run], splits: Splits, device: torch.device) -> tuple[Population, list[str]]:
    """The members before the first stage, drawn by their seeds or with the weights given, and warnings of these."""
    model = runs[0].model
    name = runs[0].name.get("model", model.factory.target)
    modules, warnings = [_build(run, splits, name) for run in runs], []
    images = splits.example()
    if model.weights is not None:
        states = read_states(model.weights)
        for module in modules:
            warnings = fill(module, states, model.weights, images=images, new_head=model.head == "new").warnings
        if model.head == "new" and set(runs[0].stages) <= {"prune"}:
            shown = ",".join(runs[0].stages)
            warnings.append(f"model.head=new: stages=[{shown}] does not train the new last layer")
    check_fits(modules[0], images, splits.num_classes, name)
    return stack(modules, device, images), warnings


def check_trains(parts: Ingredients, population: Population) -> None:
    """Refuses a module that cannot be trained on the batches that training will make, before anything is."""
    member, splits = population.member(0), parts.splits
    for loop in parts.loops.values():
        batch_size, num_images = loop.batch_size, len(splits.train)
        for size in batch_sizes(num_images, batch_size):
            trouble = _trouble(member, splits, loop, size)
            if trouble is None:
                continue
            if _trouble(member, splits, loop, 2) is not None:
                raise ConfigError(f"the model cannot be trained on this data: {trouble}")
            images = f"a batch of {size} image{'s' * (size > 1)}"
            if num_images == 1:
                raise DataError(f"data: the training set is 1 image, and the model cannot train on {images}: {trouble}")
            raise ConfigError(
                f"schedule.batch_size={batch_size}: the model cannot train on {images}: {trouble}: take another number"
            )
        break  # what one stage can train, all can
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        if part is not None and len(part) == 1:
            shown = f"{type(population.module).__name__} on one image, as the {name} set is,"
            check_fits(population.module, splits.example()[:1], splits.num_classes, shown)


def batch_sizes(num_images: int, batch_size: int) -> list[int]:
    """The sizes of the batches that `cut` makes, each once: a last batch of one image joins the one before."""
    last = num_images % batch_size or batch_size
    if num_images <= batch_size:
        return [num_images]
    last += batch_size if last == 1 else 0
    return list(dict.fromkeys((batch_size, last) if num_images > last else (last,)))


def _trouble(member: Population, splits: Splits, loop: Loop, num_images: int) -> str | None:
    """What keeps a member from training on a batch of so many images, in one line."""
    try:
        try_step(member, splits, loop.precision, num_images)
    except torch.OutOfMemoryError as error:
        return f"out of memory ({reason(error)})"
    except Exception as error:  # whatever a module of the user's own may raise
        return reason(error)
    return None


def members_at_a_time(
    parts: Ingredients, population: Population, graph: dict[str, Layer], stacked: bool | None, limit: int | None
) -> int:
    """How many members are trained as one: as many as memory takes, or one where stacking is no gain or impossible.

    stacked: None asks a short measurement on a CPU, and stacks on a GPU.
    """
    members, loop = population.num_members, next(iter(parts.loops.values()), None)
    if loop is None:
        return members
    if members == 1 or stacked is False:
        return 1
    obstacle = _obstacle(population, parts, loop)
    if obstacle is not None:
        log.info(f"{members} members are trained one after another: {obstacle}")
        return 1
    most = min(members, limit or members)
    fitting = min(most, _fitting(population, parts, graph, loop))
    if fitting < most:
        log.info(f"{members} members are trained {fitting} at a time: more do not fit")
    device = population.device
    if stacked is None and device.type == "cpu" and not _stacking_pays(population.take(list(range(fitting))), parts):
        return 1
    return fitting


def _obstacle(population: Population, parts: Ingredients, loop: Loop) -> str | None:
    """Why members cannot be trained as one; a random forward pass, among others, cannot be mapped over them."""
    if not all(each.elementwise for each in parts.loops.values()):
        return "the optimizer would mix them"
    try:
        try_step(population.take([0, 1]), parts.splits, loop.precision)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a module of the user's own may raise
        return f"the network cannot be mapped over members ({reason(error)})"
    return None


def _fitting(population: Population, parts: Ingredients, graph: dict[str, Layer], loop: Loop) -> int:
    """How many members fit into half of the free memory, by a generous count of what training holds."""
    parameters = population.parameters
    weights = sum(parameter[0].numel() for parameter in parameters.values())
    units = sum(
        layer.num_positions * _num_outputs(parameters[layer.name], population, layer) for layer in graph.values()
    )
    images = torch.Size(parts.splits.input_shape).numel()
    num_bytes = FLOAT_BYTES * (COPIES_OF_WEIGHTS * weights + loop.batch_size * (COPIES_OF_UNITS * units + images))
    return max(1, int(free_bytes(population.device) / 2 / num_bytes))


FLOAT_BYTES = 4
COPIES_OF_WEIGHTS = 10  # itself, gradient, Adam's two, last and best state, masks, what the penalty makes of it
COPIES_OF_UNITS = 6  # what a layer gives, what pooling and ReLU make of it, and their gradients


def _num_outputs(weight: Tensor, population: Population, layer: Layer) -> int:
    view = to_view(weight[0], population.layouts[layer.name])
    return view.shape[0] * view.shape[1]


def _stacking_pays(population: Population, parts: Ingredients) -> bool:
    """Whether a stacked step takes clearly less time than that of one member as many times, by a few steps of each."""
    members = population.num_members
    together, alone = (
        _seconds(some, parts.take(list(range(some.num_members)))) for some in (population, population.member(0))
    )
    share = together / (members * alone)
    pays = share < WORTH_STACKING
    how = "as one" if pays else "one after another"
    log.info(f"{members} members are trained {how}: stacked, they take {share:.2f} of the time")
    return pays


WORTH_STACKING = 0.9  # of the time of one after another: less than noise may say
ROUNDS = 5
FEW_STEPS = 4


def _seconds(population: Population, parts: Ingredients) -> float:
    """The time of a few steps of the longest stage, the least of several."""
    stage, longest = max(parts.loops.items(), key=lambda entry: entry[1].epochs)
    way = "recorded" if longest.way == "compiled" else longest.way  # compiling takes longer than it would tell
    loop = replace(longest, epochs=1 + ROUNDS, way=way)  # the first one records
    few = parts.splits.train.take(torch.arange(min(len(parts.splits.train), FEW_STEPS * loop.batch_size)))
    generators = [torch.Generator().manual_seed(seed) for seed in parts.seeds]
    splits = replace(parts.splits, train=few, validation=None)
    penalty = parts.penalty if stage == "regularize" else None
    history = train(population, splits, loop, generators, penalty=penalty).history
    return min(row.seconds for row in history[1:] or history)


def check_methods(run: Run, population: Population, parts: Ingredients) -> None:
    """Refuses a penalty or a rule that fails on the population, before anything trains."""
    _check_normalised(run, population, parts)
    try:
        stages.rehearse(population, parts)
    except SparsityError:
        raise
    except Exception as error:  # whatever a method of the user's own may raise
        methods = f"reg={run.name.get('reg')}, prune={run.name.get('prune')}"
        raise ConfigError(f"{methods}: a method fails on the model's parameters: {reason(error)}") from error
    if "prune" in run.stages:
        _check_pruned(population.member(0), parts)


def _check_normalised(run: Run, population: Population, parts: Ingredients) -> None:
    """Refuses rules and penalties on parameters that a weight is made of anew in every pass."""
    makers = normalised(population.module)
    ruled = {name for names, _ in parts.rule.pools for name in names} if "prune" in run.stages else set()
    penalised = set()
    if run.reg.penalty is not None and "regularize" in run.stages:
        penalised = {name for name, layout in population.layouts.items() if layout.kind in run.reg.apply_to}
    for name, maker in makers.items():
        layer = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        remedy = f"leave it out by prune.exclude=[{layer}]" if name in ruled else "take reg=none"
        if name in ruled | penalised:
            raise ConfigError(
                f"{name} cannot be pruned or penalised: {maker} makes the weight of it anew in every pass, by its "
                f"parametrization, and zeros of the one are not the other's: build the model without, or {remedy}"
            )


def _check_pruned(member: Population, parts: Ingredients) -> None:
    """Refuses weights that the network divides by: with a whole output pruned, it would give NaN."""
    names = [name for pool, _ in parts.rule.pools for name in pool if member.layouts[name].kind == "weight"]
    images = parts.splits.example().to(member.device)

    def without(names: list[str]) -> Population:
        first = {name: to_view(member.parameters[name][0], member.layouts[name]).clone() for name in names}
        for view in first.values():
            view[:, 0] = 0
        pruned = {
            name: from_view(view, member.layouts[name], tuple(member.parameters[name].shape[1:])).unsqueeze(0)
            for name, view in first.items()
        }
        return replace(member, parameters={**member.parameters, **pruned})

    try:
        if is_finite(without(names), images) or not is_finite(member, images):
            return
    except Exception as error:  # a module that cannot be differentiated, which `check_trains` tells of
        log.debug(f"the pruned network is not tried: {reason(error)}")
        return
    culprit = next((name for name in names if not is_finite(without([name]), images)), ", ".join(names))
    raise ConfigError(
        f"{culprit} cannot be pruned: without one of its outputs the network gives NaN, as where a weight is divided "
        f"by its own length: leave it out by prune.exclude=[{culprit}], or build the model without"
    )


def _build(run: Run, splits: Splits, name: str) -> torch.nn.Module:
    try:
        return build(
            run.model.factory.partial(), splits.input_shape, splits.num_classes, derived_seed(run.seed, "weights")
        )
    except SparsityError:
        raise
    except Exception as error:  # whatever a factory of the user's own may raise
        raise ConfigError(
            f"model={name} cannot be built for images {list(splits.input_shape)}: {reason(error)}"
        ) from error


def ingredients(
    runs: Sequence[Run], splits: Splits, population: Population, device: torch.device, units: Units | None
) -> Ingredients:
    """What the stages of the runs' population are made of."""
    first = runs[0]
    num_bytes = image_bytes(population, splits)
    loops = {stage: _loop(first, stage, population, splits) for stage in first.stages if stage != "prune"}
    return Ingredients(
        splits=splits,
        loops={stage: replace(loop, image_bytes=num_bytes) for stage, loop in loops.items()},
        penalty=_penalty(runs, population.layouts, device),
        rule=_rule(runs, population.layouts, device),
        seeds=[run.seed for run in runs],
        watcher=lambda stage: _watch(loops[stage], stage, len(splits.train)),
        units=units,
        image_bytes=num_bytes,
    )


def _loop(run: Run, stage: str, population: Population, splits: Splits) -> Loop:
    numbers = getattr(run.schedule, stage)
    optimizer = partial(_optimizer, run, numbers.lr, numbers.weight_decay)
    tried = _tried_optimizer(run, optimizer)
    num_steps = numbers.epochs * count_batches(len(splits.train), run.schedule.batch_size)
    return Loop(
        epochs=numbers.epochs,
        batch_size=run.schedule.batch_size,
        learning_rate=partial(learning_rate, lr=numbers.lr, shape=numbers.shape, warmup=numbers.warmup),
        optimizer=optimizer,
        precision=PRECISIONS[precision_of(run, population.device)],
        way=way_of(run, stage, population, num_steps),
        elementwise=is_elementwise(tried),
    )


def way_of(run: Run, stage: str, population: Population, num_steps: int) -> Way:
    """How the steps of a stage are computed; `auto` leaves a module alone whose code may depend on values.

    Of a network with convolutions the penalty alone is compiled: the compiler's own convolutions are slower.
    """
    device = population.device.type
    if run.step == "compiled" and device != "cpu":
        raise ConfigError(f"step=compiled is for a CPU, and the device is {device}: take step=recorded, a CUDA graph")
    if run.step != "auto":
        return run.step
    targets = [call.target for call in (run.model.factory, run.reg.penalty, run.optimizer) if call is not None]
    if num_steps < WORTH_RECORDING or not is_known(population.module, *targets) or device not in ("cpu", "cuda"):
        return "eager"
    has_gain = not convolves(population) or (stage == "regularize" and run.reg.penalty is not None)
    is_compiled = has_gain and num_steps >= WORTH_COMPILING and device == "cpu"
    return "compiled" if is_compiled else "recorded"


# Steps of a stage. Recording takes 0.3 s and gains 0.5 ms a step on LeNet-300-100 with HS; compiling gains 0.7 ms more
# and takes 2 s, or once 11 s on a machine that has not compiled the network before.
WORTH_RECORDING, WORTH_COMPILING = 1_000, 8_000


def _optimizer(run: Run, lr: float, weight_decay: float, tensors: list[Tensor]) -> torch.optim.Optimizer:
    return run.optimizer.partial(lr=lr, weight_decay=weight_decay)(tensors)


def _tried_optimizer(run: Run, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer of one number; refuses settings that it refuses, before anything trains."""
    tensor = torch.zeros(1, requires_grad=True)
    tensor.sum().backward()
    name = run.name.get("optimizer")
    try:
        tried = optimizer([tensor])
        tried.step()
    except Exception as error:  # each optimizer refuses in its own way
        raise ConfigError(f"optimizer={name}: {reason(error)}") from error
    if run.step in ("recorded", "compiled") and not can_be_recorded(tried):
        raise ConfigError(f"step={run.step} needs a fused optimizer, and optimizer={name} is none: take step=eager")
    return tried


def _penalty(runs: Sequence[Run], layouts: dict[str, Layout], device: torch.device) -> Penalty | None:
    """The penalty of all members; the method's floats may differ between them."""
    reg = runs[0].reg
    if reg.penalty is None:
        return None
    names = [name for name, layout in layouts.items() if layout.kind in reg.apply_to]
    if not names:
        raise ConfigError(f"reg.apply_to={reg.apply_to}: the model has no such parameters")
    method = _method([run.reg.penalty for run in runs], device)
    function = stages.total_penalty(method.function, layouts, names)
    return Penalty(function, torch.tensor([run.reg.decay for run in runs], device=device), method.numbers)


def _method(calls: Sequence[schema.Call], device: torch.device) -> stages.Method:
    """A method of all members: its floats, which may differ between them, apart from what they share."""
    numbers = calls[0].numbers
    shared = {name: number for name, number in numbers.items() if not isinstance(number, float)}
    floats = {
        name: torch.tensor([call.numbers[name] for call in calls], device=device)
        for name in numbers
        if name not in shared
    }
    return stages.Method(partial(calls[0].function, **shared), floats)


def _rule(runs: Sequence[Run], layouts: dict[str, Layout], device: torch.device) -> stages.Rule:
    """The pruning rule of all members, its parameters in pools of one sensitivity a member."""
    rule = runs[0].prune
    _check_layers(rule, layouts)
    names = [name for name, layout in layouts.items() if layout.kind in rule.apply_to]
    names = [name for name in names if not any(_is_in(name, layer) for layer in rule.exclude)]
    if "prune" in runs[0].stages:
        _check_prunes(rule, names)
    owners = {name: owner_of(name, rule.layers) for name in names}
    pools = []
    for owner in dict.fromkeys(owners.values()):
        numbers = [run.sensitivity if owner is None else run.prune.layers[owner] for run in runs]
        pools.append(([name for name in names if owners[name] == owner], torch.tensor(numbers, device=device)))
    return stages.Rule(
        mask=_method([run.prune.rule for run in runs], device),
        cut=None if rule.cut is None else _method([run.prune.cut for run in runs], device),
        whole=rule.scope == "network",
        structural=rule.structural,
        pools=pools,
        excluded=frozenset(name for name in layouts if any(_is_in(name, layer) for layer in rule.exclude)),
    )


def _check_prunes(rule: schema.Rule, names: list[str]) -> None:
    """Refuses a rule, or a layer's own sensitivity, that would prune nothing."""
    if not names:
        raise ConfigError(f"prune.apply_to={rule.apply_to} and prune.exclude={rule.exclude} leave nothing to prune")
    for layer in rule.layers:
        if not any(_is_in(name, layer) for name in names):
            raise ConfigError(f"prune.layers.{layer} does nothing: prune.apply_to={rule.apply_to} leaves it alone")


def _check_layers(rule: schema.Rule, layouts: dict[str, Layout]) -> None:
    for key, layers in (("prune.exclude", rule.exclude), ("prune.layers", list(rule.layers))):
        for layer in layers:
            if not any(_is_in(name, layer) for name in layouts):
                known = dict.fromkeys(name.rpartition(".")[0] for name in layouts)
                raise ConfigError(f"{key} names '{layer}', which the model lacks: its layers are {', '.join(known)}")


def _is_in(name: str, layer: str) -> bool:
    """Whether a parameter is of a layer: fc1.weight of fc1.weight, of fc1, and features.0.weight of features."""
    return name == layer or name.startswith(f"{layer}.")


def owner_of(name: str, layers: dict[str, float]) -> str | None:
    """The longest of the layers' names that a parameter is of."""
    return max((layer for layer in layers if _is_in(name, layer)), key=len, default=None)


def _watch(loop: Loop, stage: str, num_images: int) -> console.StageProgress:
    num_batches = count_batches(num_images, loop.batch_size)
    return console.StageProgress(stage, loop.epochs, num_batches, compiles=loop.way == "compiled")
