"""Which of a file's names are a model's: what wrappers put before or between them is taken off."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsity.weights.reading import States

# What wrappers of torch's put into names anywhere: DataParallel, torch.compile, FSDP, activation checkpoints.
TECHNICAL = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
# Under what programs keep the network itself, as against an average or a teacher; the first ones first.
PLAIN = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "weights", "classifier")


@dataclass(frozen=True)
class Reading:
    """One way to take some of a file's names for the model's."""

    states: States
    prefix: str  # before the names in the file, taken off
    names: dict[str, str]  # the model's → the file's

    @property
    def place(self) -> tuple[str, ...]:
        """The keys and parts of names that lead to it, without what wrappers of torch's put there."""
        parts = (*self.states.keys, *self.prefix.split(".")[:-1])
        return tuple(part for part in parts if part not in TECHNICAL)

    @property
    def rank(self) -> tuple[int, ...] | None:
        """Where it stands among the usual places of the network itself, or None."""
        return tuple(PLAIN.index(part) for part in self.place) if set(self.place) <= set(PLAIN) else None

    @property
    def left(self) -> list[str]:
        """The file's names that are not the model's."""
        used = set(self.names.values())
        return [name for name in (*self.states.tensors, *self.states.others) if name not in used]


def readings(states: States, own: Collection[str]) -> Iterator[Reading]:
    """Every way to take names of a file for those of a model, `own`, by leaving out what stands before either.

    Only a prefix that wrappers are known for is taken off where the rest would be a bare `weight`.
    """
    names = [*states.tensors, *(name for name in states.others if name in own or "." in name)]
    for prefix in _prefixes(names, own):
        rest = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        yield Reading(states, prefix, _matched(rest, own))
    before = common_prefix(own)
    inner = [name.removeprefix(before) for name in own]
    if before and all("." in name for name in inner):
        names_of_inner = _matched({name: name for name in names}, inner)
        yield Reading(states, "", {before + name: found for name, found in names_of_inner.items()})


def _prefixes(names: Sequence[str], own: Collection[str]) -> list[str]:
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:length]) + "." for length in range(1, len(parts)))
    is_dotted = all("." in name for name in own)
    known = TECHNICAL | set(PLAIN)
    return [""] + [
        prefix
        for prefix, count in counts.items()
        if 2 * count >= len(own) and (is_dotted or set(prefix.split(".")[:-1]) <= known)
    ]


def _matched(rest: Mapping[str, str], own: Collection[str]) -> dict[str, str]:
    """The names of the model that are found, literally or but for wrappers of torch's; where that is unambiguous."""
    found = {name: rest[name] for name in own if name in rest}
    here, there = (_by_bare_name(name for name in names if name not in found) for names in (own, rest))
    for bare, (name, *others) in here.items():
        candidates = there.get(bare, [])
        if not others and len(candidates) == 1:
            found[name] = rest[candidates[0]]
    return found


def _by_bare_name(names: Iterator[str]) -> dict[str, list[str]]:
    """Names by what is left of them without what wrappers of torch's put into them."""
    bare: dict[str, list[str]] = {}
    for name in names:
        bare.setdefault(".".join(part for part in name.split(".") if part not in TECHNICAL), []).append(name)
    return bare


def common_prefix(names: Collection[str]) -> str:
    """What all names begin with, in whole parts: `net.` of net.fc1.weight and net.fc2.weight."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(each) > shared for each in parts) and len({each[shared] for each in parts}) == 1:
        shared += 1
    return ".".join([*parts[0][:shared], ""]) if parts and shared else ""
