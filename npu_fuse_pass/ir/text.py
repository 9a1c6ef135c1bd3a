"""Formulas as text that identifies them and can be parsed back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_fuse_pass.ir.expr import DTYPE_NAMES, DTYPES, Expr, postorder
from npu_fuse_pass.ir.types import Formula, Slot


def serialise(slots: Sequence[Slot], writes: Sequence[tuple[int, Expr]], contributions: Sequence[Expr]) -> str:
    """One line per expression, in order of first use: the identity of a formula."""
    lines = [f"slot {i}: {slot}" for i, slot in enumerate(slots)]
    names: dict[int, str] = {}
    for e in postorder([*(e for _, e in writes), *contributions]):
        if e.op == "leaf":
            names[id(e)] = f"${e.value}"
            continue
        names[id(e)] = name = f"%{len(lines) - len(slots)}"
        value = DTYPE_NAMES[e.value] if isinstance(e.value, torch.dtype) else ""
        inner = ", ".join([*(names[id(a)] for a in e.args), *([value] if value else [])])
        lines.append(f"{name}: {DTYPE_NAMES[e.dtype]}{'[]' if e.tensor else ''} = {e.op}({inner})")
    lines += [f"write ${slot} = {names[id(e)]}" for slot, e in writes]
    lines += [f"contribute {names[id(e)]}" for e in contributions]
    return "\n".join(lines)


def parse(text: str) -> Formula:
    """The formula that `serialise` wrote."""
    slots: list[Slot] = []
    made: dict[str, Expr] = {}
    writes: list[tuple[int, Expr]] = []
    contributions: list[Expr] = []

    def ref(name: str) -> Expr:
        if name.startswith("$") and name not in made:
            slot = slots[int(name[1:])]
            made[name] = Expr("leaf", (), int(name[1:]), slot.dtype, slot.tensor)
        return made[name]

    for line in text.splitlines():
        head, _, rest = line.partition(" ")
        if head == "slot":
            kind = rest.split(": ")[1]
            slots.append(Slot(kind in DTYPES, DTYPES.get(kind, torch.float64), kind == "total"))
        elif head == "write":
            slot, name = rest.split(" = ")
            writes.append((int(slot[1:]), ref(name)))
        elif head == "contribute":
            contributions.append(ref(rest))
        else:
            kind, _, call = rest.partition(" = ")
            op, _, inner = call[:-1].partition("(")
            parts = [p for p in inner.split(", ") if p]
            value = DTYPES[parts.pop()] if op == "cast" else (0 if op in ("zero", "numel") else None)
            dtype = DTYPES[kind.removesuffix("[]")]
            made[head[:-1]] = Expr(op, tuple(map(ref, parts)), value, dtype, kind.endswith("[]"))
    return Formula(tuple(slots), tuple(writes), tuple(contributions), text)
