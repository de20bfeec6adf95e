"""The data of a run and its fingerprint; the last data asked for is kept for the next member of a sweep."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsity import console, store
from sparsity.config import Run
from sparsity.data import Files, Images, Source, Splits, as_source, file_state, split, state_of
from sparsity.errors import DataError, SparsityError, reason


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
            # nobody knows what a custom loader has read: it is asked again, but not by every member
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
    except Exception as error:  # whatever a custom loader may raise
        raise DataError(f"data={name} cannot be loaded: {reason(error)}") from error


def _paths_in(numbers: Mapping[str, object]) -> list[str]:
    """The files and folders that a custom loader was given."""
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
    listed = [file_state(path) for path in part.paths]  # of a custom loader
    return store.key_of({"files": listed, "labels": part.labels.tolist(), "shape": list(part.shape)})
