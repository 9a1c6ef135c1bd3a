"""The fused node and its reference semantics.

`npu_fused::multi_tensor_update(tensors, scalars, members, formula) -> Tensor[]` computes the new values of all
writes of a group. `tensors` and `scalars` are slot-major: slot 0 of every member, slot 1 of every member, ...;
`formula` is the text of `ir.text.serialise`. The result is write-major. `npu_fused::multi_tensor_contribute` gives
what every member adds to each total, contribution-major. Both are functional; `copy_` writes the results back.

The eager kernels here interpret the formula with torch's own operations: the oracle for every lowering, and what runs
where there is no compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.dimensions import EXPAND, OVER, elements, has_dimensions, small
from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.tensors.stochastic import stochastic_round

_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define("multi_tensor_update(Tensor[] tensors, Tensor[] scalars, int members, str formula) -> Tensor[]")
_library.define("multi_tensor_contribute(Tensor[] tensors, Tensor[] scalars, int members, str formula) -> Tensor[]")
multi_tensor_update = torch.ops.npu_fused.multi_tensor_update.default
multi_tensor_contribute = torch.ops.npu_fused.multi_tensor_contribute.default

parsed: Callable[[str], Formula] = functools.lru_cache(maxsize=256)(parse)


# IR operation -> torch; the rest have torch's own name
_TORCH: dict[str, Callable[..., Tensor]] = {
    "fma": lambda x, y, z: torch.addcmul(z, x, y),  # ATen's addcmul has one rounding
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "not": torch.logical_not,
    "sum": lambda x: x.double().sum(),
    "amax": lambda x: x.double().amax(),
    "amin": lambda x: x.double().amin(),
    "stochastic": stochastic_round,
}


def evaluate(
    formula: Formula, tensors: dict[int, Tensor], scalars: dict[int, Tensor], numel: Tensor | None = None
) -> dict[int, Tensor]:
    """Values of all roots of a formula for one member, by `id` of the expression; slots give the leaves.

    `numel`: the elements of the member's tensors, where those are not given.
    """
    values: dict[int, Tensor] = {}
    if tensors and (has_dimensions(formula.roots) or len({t.shape for t in tensors.values()}) > 1):
        few = small(formula.writes, formula.roots)
        sizes = {slot: t.numel() for slot, t in tensors.items() if slot not in few}
        count = elements(formula.roots, sizes, {slot: float(t) for slot, t in scalars.items()})
        numel = torch.tensor(float(count), dtype=torch.float64, device="cpu") if numel is None else numel
        tensors = {slot: t.reshape(-1) for slot, t in tensors.items()}
    for e in postorder(formula.roots):
        values[id(e)] = numel if numel is not None and e.op == "numel" else _value(e, values, tensors, scalars)
    return values


def _value(e: Expr, values: dict[int, Tensor], tensors: dict[int, Tensor], scalars: dict[int, Tensor]) -> Tensor:
    if e.op == "leaf":
        assert isinstance(e.value, int)
        return tensors[e.value].detach() if e.tensor else scalars[e.value].double()
    args = [values[id(a)] for a in e.args]
    if e.op == "cast":
        return args[0].to(e.dtype)
    if e.op == EXPAND or e.op in OVER:
        r0, k0, r1, k1 = (int(a) for a in args[1:])
        if e.op == EXPAND:
            return args[0].reshape(1, k0, 1, k1).expand(r0, k0, r1, k1).reshape(-1)
        reduce: Callable[..., Tensor] = getattr(torch, OVER[e.op])
        return reduce(args[0].reshape(r0, k0, r1, k1), dim=(0, 2)).reshape(-1)
    if e.op == "numel":
        count = next(iter(tensors.values())).numel() if tensors else 1
        return torch.tensor(float(count), dtype=torch.float64, device="cpu")
    if e.op == "zero":
        return torch.zeros((), dtype=e.dtype, device="cpu")
    function = _TORCH.get(e.op) or getattr(torch, e.op)
    result: Tensor = function(*args)
    # a 0-dim parameter would otherwise be promoted by a float64 scalar
    return result if e.dtype in (torch.bool, result.dtype) else result.to(e.dtype)


def member_values(formula: Formula, tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> dict[int, Tensor]:
    """`evaluate` with a member's leaves given in the order of the formula's tensor and scalar slots."""
    numbers = [scalar.reshape(()) for scalar in scalars]  # a tensor of one element may hold one
    return evaluate(
        formula,
        dict(zip(formula.tensor_slots, tensors, strict=True)),
        dict(zip(formula.scalar_slots, numbers, strict=True)),
    )


def _per_member(
    tensors: Sequence[Tensor], scalars: Sequence[Tensor], members: int, text: str, update: bool
) -> list[Tensor]:
    formula = parsed(text)
    results: list[list[Tensor]] = []
    for m in range(members):
        values = member_values(formula, tensors[m::members], scalars[m::members])
        results.append(
            [new_value(formula, slot, values[id(e)], tensors[m::members]) for slot, e in formula.writes]
            if update
            else [values[id(e)] for e in formula.contributions]
        )
    return [row[k] for k in range(len(results[0])) for row in results] if results else []


def new_value(formula: Formula, slot: int, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """A written value as it is stored: a scalar for a tensor slot is expanded to its shape."""
    if not formula.slots[slot].tensor:
        return value.clone()
    shape = tensors[formula.tensor_slots.index(slot)].shape
    value = value.to(formula.slots[slot].dtype)
    return (value.expand(shape) if value.dim() == 0 or value.shape == shape else value.reshape(shape)).clone()


def fake_update(tensors: Sequence[Tensor], scalars: Sequence[Tensor], members: int, formula: str) -> list[Tensor]:
    """Fake results: the shapes, dtypes and layouts of the written tensors."""
    made = parsed(formula)
    rank = {s: i for i, s in enumerate(made.tensor_slots)}
    results = []
    for slot in made.written:
        for m in range(members):
            like = tensors[rank[slot] * members + m] if slot in rank else scalars[0].reshape(())
            results.append(torch.empty_like(like, dtype=made.slots[slot].dtype))
    return results


def _fake_contribute(tensors: Sequence[Tensor], scalars: Sequence[Tensor], members: int, formula: str) -> list[Tensor]:
    count = len(parsed(formula).contributions) * members
    return [torch.empty((), dtype=torch.float64, device=tensors[0].device) for _ in range(count)]


_library.impl("multi_tensor_update", functools.partial(_per_member, update=True), "CompositeExplicitAutograd")
_library.impl("multi_tensor_contribute", functools.partial(_per_member, update=False), "CompositeExplicitAutograd")
torch.library.register_fake("npu_fused::multi_tensor_update", fake_update, lib=_library)
torch.library.register_fake("npu_fused::multi_tensor_contribute", _fake_contribute, lib=_library)
