"""The networks that losses learn from: where the weights of each lie, and of which model they are."""

from pathlib import Path
from typing import Any

from sparsity.config.paths import at_home
from sparsity.errors import ConfigError
from sparsity.nodes import TEACHER, Loss

MODEL = f"{TEACHER}_model"  # the key beside it
RESULT, SWEEP = "result.json", "sweep.json"


def with_teachers(node: dict[str, Any]) -> dict[str, Any]:
    """A plain config whose losses name the weights file of their teacher, and the model that it is of.

    That is the one that is typed, else the one that the file says, else the run's own.
    """
    own = node.get("model")
    first = {"loss": _named("loss", node.get("loss"), own)}
    return {name: first[name] if name in first else _named(name, value, own) for name, value in node.items()}


def _named(key: str, value: Any, own: Any) -> Any:
    if not isinstance(value, dict):
        return value
    path = value.get(TEACHER)
    if "function" not in value or not isinstance(path, str) or not path:
        return {name: _named(f"{key}.{name}", each, own) for name, each in value.items()}
    from sparsity.weights import described

    file = _weights_file(f"{key}.{TEACHER}", path)
    model = value.get(MODEL)
    if model is None:
        about = described(file, f"{key}.{TEACHER}")
        factory = own["factory"] if about is None else {**about["factory"], "_partial_": True}
        model = {"factory": factory, "weights": None}
    return {**value, TEACHER: str(file), MODEL: model}


def _weights_file(key: str, path: str) -> Path:
    """The file itself, or that of a finished run's folder."""
    from sparsity.weights import NETWORK

    place = Path(at_home(path))
    if not place.exists():
        raise ConfigError(f"{key}={path} is not there: give the folder of a run, or a weights file")
    if not place.is_dir():
        return place
    if (place / RESULT).is_file() and (place / NETWORK).is_file():
        return place / NETWORK
    if (place / SWEEP).is_file():
        raise ConfigError(f"{key}={path} is the folder of a sweep: give that of one of its members")
    lacks = NETWORK if (place / RESULT).is_file() else RESULT
    raise ConfigError(f"{key}={path} is no folder of a finished run, as it lacks {lacks}: give another, or a file")


def check_teacher(loss: Loss, key: str, is_used: bool = True) -> None:
    """Refuses a teacher that the loss does not ask for, and the lack of one that it needs; key: that of the loss."""
    name = loss.function.target.rpartition(".")[2]
    if loss.teacher is None:
        if loss.teacher_model is not None:
            raise ConfigError(f"{key}.{MODEL} does nothing without {key}.{TEACHER}=FILE: give one")
        if loss.asks_for_teacher and is_used:
            raise ConfigError(
                f"{key}.{TEACHER} is missing: {name} learns from the outputs of a trained network: give the folder of "
                "a run, or a weights file"
            )
        return
    if not loss.asks_for_teacher:
        raise ConfigError(f"{key}.{TEACHER}={loss.teacher} does nothing: {name} asks for none: take loss=distill")
    for setting in ("weights", "head"):
        if (value := getattr(loss.teacher_model, setting)) is not None:
            raise ConfigError(f"{key}.{MODEL}.{setting}={value} does nothing: the weights are {key}.{TEACHER}'s")
