"""The teachers of a population, built and checked before anything trains; and what a result says of one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsity import nodes
from sparsity.config import Run
from sparsity.data import Splits
from sparsity.errors import ConfigError, SparsityError, reason
from sparsity.evaluation import image_bytes, images_at_once
from sparsity.files import Unreadable, file_digest
from sparsity.models import build, check_fits
from sparsity.population import stack
from sparsity.results.sealed import RESULT, read_result
from sparsity.teachers import Teacher
from sparsity.weights import described, fill, read_states


def losses_with_teachers(run: Run) -> Iterator[tuple[str, nodes.Loss]]:
    """The losses of a run's stages that have a teacher, each with its key."""
    for stage in run.recipe:
        for argument, value in stage.call.numbers.items():
            if isinstance(value, nodes.Loss) and value.teacher is not None:
                yield stage.sources.get(argument, f"recipe.{stage.node}.{argument}"), value


def teachers_of(run: Run, splits: Splits, device: torch.device) -> tuple[dict[str, Teacher], list[str]]:
    """The teachers of a run by their weights files, and warnings; those of other classes or images are refused.

    splits: on the device.
    """
    found: dict[str, Teacher] = {}
    warnings: list[str] = []
    for key, loss in losses_with_teachers(run):
        if loss.teacher not in found:
            found[loss.teacher], said = _teacher(f"{key}.teacher", loss, splits, device, run.schedule.batch_size)
            warnings += said
    return found, warnings


def _teacher(
    key: str, loss: nodes.Loss, splits: Splits, device: torch.device, batch_size: int
) -> tuple[Teacher, list[str]]:
    about, images = described(loss.teacher, key) or {}, splits.example()
    _check_alike(f"{key}={loss.teacher}", about, splits)
    factory = loss.teacher_model.factory
    name = f"{key}={loss.teacher}, a {factory.target.rpartition('.')[2]},"
    try:
        module = build(factory.partial(), splits.input_shape, splits.num_classes, seed=0)
    except SparsityError:
        raise
    except Exception as error:  # whatever a custom factory may raise
        raise ConfigError(f"{name} cannot be built for images {list(splits.input_shape)}: {reason(error)}") from error
    warnings = fill(module, read_states(loss.teacher, key), loss.teacher, key).warnings
    check_fits(module, images, splits.num_classes, factory.target.rpartition(".")[2])
    with torch.no_grad():
        if not module.eval()(images).isfinite().all():
            raise ConfigError(f"{name} gives NaN or infinity on images of this data: take another")
    population = stack([module], device, images)
    at_once = images_at_once(population, batch_size, image_bytes(population, splits))
    return Teacher(module, splits, device, name, at_once), warnings + _scaled_otherwise(key, about, splits)


def _check_alike(given: str, about: Mapping[str, Any], splits: Splits) -> None:
    """Refuses a teacher that a file says to be of other classes or images than the run's; about: what it says."""
    shape, count = about.get("input_shape"), about.get("num_classes")
    if shape not in (None, list(splits.input_shape)):
        raise ConfigError(f"{given} is of images {shape}, and the data's are {list(splits.input_shape)}")
    if count not in (None, splits.num_classes):
        raise ConfigError(f"{given} is of {count} classes, and the data has {splits.num_classes}")
    theirs, ours = about.get("classes"), splits.classes
    if theirs and ours and list(theirs) != list(ours):
        place = next(index for index, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1])
        how = "in another order" if sorted(theirs) == sorted(ours) else "of other classes"
        raise ConfigError(
            f"{given} is {how}: its output {place} is {theirs[place]}, and the data's class {place} is {ours[place]}"
        )


def _scaled_otherwise(key: str, about: Mapping[str, Any], splits: Splits) -> list[str]:
    """A line where a teacher was trained on pixels that were scaled otherwise than the run's."""
    theirs, ours = [about.get(name) for name in ("mean", "std")], [splits.mean, splits.std]
    if not about or theirs == ours:
        return []
    shown = [f"mean {mean}, std {std}" if mean else "as they are" for mean, std in (theirs, ours)]
    return [f"{key}: it was trained on pixels {shown[0]}, and sees those of this run, {shown[1]}"]


# --- what a result says ----------------------------------------------------------------------------------------------


def describe_teacher(loss: nodes.Loss) -> dict[str, Any]:
    """A teacher as a result names it: its model, the hash of its weights, and its accuracy, where a result has it."""
    factory, digest = loss.teacher_model.factory, file_digest(loss.teacher)
    numbers = [f"{name}={value}" for name, value in factory.numbers.items()]
    model = " ".join([factory.target.removeprefix("sparsity.models."), *numbers])
    return {"model": model, "sha256": digest, "accuracy": _accuracy(Path(loss.teacher), digest)}


def _accuracy(file: Path, digest: str) -> dict[str, float | None]:
    """What a run measured of one of its weights files; nulls of any other file."""
    for folder in (file.parent, file.parent.parent):
        try:
            result = read_result(folder / RESULT)
        except (Unreadable, OSError):
            continue
        name = file.relative_to(folder).as_posix()
        if result.get("files", {}).get(name, {}).get("sha256") != digest:
            continue
        stages = {f"stages/{stage['name']}.safetensors": stage["accuracy"] for stage in result["stages_run"]}
        found = stages.get(name, result["accuracy"]["final"])
        return {part: found[part] for part in ("validation", "test")}
    return {"validation": None, "test": None}
