"""Names of leaves, parameters and expressions in a dump, and abbreviated lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from npu_fuse_pass.ir.expr import DTYPE_NAMES
from npu_fuse_pass.ir.types import Call, Formula, Group, Leaf

_PLACE = re.compile(r"param_groups_+(\d+)_+params_+(\d+)_*$")

_SHOWN = 4  # of a list; the rest is only counted
T = TypeVar("T")


def labels_of(group: Group, leaves: Sequence[Leaf], member: tuple[int, ...]) -> list[str]:
    """The names of a formula's slots for one member: numbers of the graph by their value."""
    kinds = ((leaves[i], label) for i, label in zip(member, group.labels, strict=True))
    return [f"{leaf.value:g}" if leaf.kind == "constant" else label for leaf, label in kinds]


def written_leaf(formula: Formula, labels: Sequence[str], leaves: Sequence[Leaf], member: tuple[int, ...]) -> Leaf:
    """The leaf that names a member: its parameter, or the first tensor that it writes."""
    written = [slot for slot in formula.written if formula.slots[slot].tensor]
    named = [slot for slot in written if labels[slot] == "param"]
    return leaves[member[(named or written or formula.written or [0])[0]]]


def called(call: Call) -> str:
    """The name of what an original operation calls."""
    return call.target if isinstance(call.target, str) else str(getattr(call.target, "__name__", call.target))


def parameter_name(leaf: Leaf) -> str:
    """The leaf's place in the optimizer if Dynamo's name has it, else the leaf's name."""
    place = _PLACE.search(leaf.name)
    return f"param_groups[{place[1]}].params[{place[2]}]" if place else leaf.name


def typed(value: Leaf | Tensor) -> str:
    """Dtype and shape, as in f32[64, 3]."""
    dtype = DTYPE_NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f"{dtype}[{', '.join(map(str, value.shape))}]"


def parameters(count: int, of_params: bool) -> str:
    """A number of parameters, as in "× 198 parameters"; of updates, where nothing written is known as one."""
    noun = "parameter" if of_params else "update"
    return f"× {count} {noun}{'s' if count != 1 else ''}"


def few(names: Sequence[str]) -> str:
    """The names of a list; of a long one the first and the last."""
    if len(names) <= _SHOWN + 1:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN - 1])}, … {names[-1]}"


def counted(values: Iterable[str]) -> str:
    """Values in order, repeated ones once with their count."""
    return ", ".join(_times(", ".join(pattern), len(pattern), count) for pattern, count in runs(list(values)))


def _times(text: str, length: int, count: int) -> str:
    if count == 1:
        return text
    return f"{text} × {count}" if length == 1 else f"({text}) × {count}"


def runs(values: Sequence[T], longest: int = 16) -> Iterator[tuple[Sequence[T], int]]:
    """A list as patterns of so many values at most, each with its number of repetitions."""
    start = 0
    while start < len(values):
        best = 1, 1
        for length in range(1, min(longest, (len(values) - start) // 2) + 1):
            pattern = values[start : start + length]
            count = 1
            while values[start + count * length : start + (count + 1) * length] == pattern:
                count += 1
            if count > 1 and count * length > best[0] * best[1]:
                best = length, count
        yield values[start : start + best[0]], best[1]
        start += best[0] * best[1]
