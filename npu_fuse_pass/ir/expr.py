"""Expressions: nodes of a DAG over one parameter's update.

A *tensor* expression has one value per element, a *scalar* expression (0-dim) one per member, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.reasons import Code

Value = int | float | bool | torch.dtype | None

DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.bool: "bool",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
HALF = (torch.float16, torch.bfloat16)
REDUCTIONS = ("sum", "amax", "amin")


class Expr:
    """One node. `value` is the leaf's position (op "leaf"), the total's number ("total") or the constant ("const")."""

    __slots__ = ("args", "dtype", "op", "tensor", "value")

    def __init__(self, op: str, args: tuple[Expr, ...], value: Value, dtype: torch.dtype, tensor: bool) -> None:
        self.op = op
        self.args = args
        self.value = value
        self.dtype = dtype
        self.tensor = tensor

    def __repr__(self) -> str:
        return self._shown(levels=4)  # of what may be thousands

    def _shown(self, levels: int) -> str:
        inner = ", ".join(a._shown(levels - 1) for a in self.args) if self.args and levels else "..."
        return f"{self.op}({inner if self.args else repr(self.value)})"


class Builder:
    """A maker of expressions: equal ones once (hash-consing; a + b equals b + a), with every cast written out.

    Attributes:
        put_right: True if an expression is another than what was captured, of which it is known that eager computes
            something else.
    """

    def __init__(self) -> None:
        self.put_right = False
        self._made: dict[object, Expr] = {}

    def make(self, op: str, args: tuple[Expr, ...], value: Value, dtype: torch.dtype, tensor: bool) -> Expr:
        ids = map(id, args)
        key = (op, tuple(sorted(ids) if op in COMMUTATIVE else ids), value, dtype, tensor)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = Expr(op, args, value, dtype, tensor)
        return found

    def leaf(self, position: int, dtype: torch.dtype, tensor: bool) -> Expr:
        """The value of a leaf before the step; 0-dim leaves are read as float64."""
        return self.make("leaf", (), position, dtype if tensor else torch.float64, tensor)

    def const(self, value: float) -> Expr:
        """A number. Never shared, so that parameter groups whose constants happen to be equal get the same formula."""
        return Expr("const", (), float(value), torch.float64, False)

    def total(self, number: int) -> Expr:
        """The sum over all members' contributions with this number."""
        return self.make("total", (), number, torch.float64, False)

    def numel(self) -> Expr:
        """The number of elements of the member's tensors."""
        return self.make("numel", (), 0, torch.float64, False)

    def cast(self, x: Expr, dtype: torch.dtype) -> Expr:
        return x if x.dtype == dtype else self.make("cast", (x,), dtype, dtype, x.tensor)

    def op(self, name: str, *args: Expr) -> Expr:
        """A pointwise operation in the dtype of its tensor arguments; among scalars in float64."""
        tensors = [a for a in args if a.tensor and a.dtype != torch.bool]
        dtype = tensors[0].dtype if tensors else torch.float64
        if any(t.dtype != dtype for t in tensors):
            raise Unsupported(
                name, f"mixes {sorted({DTYPE_NAMES[t.dtype] for t in tensors})} without a cast", Code.MIXED_DTYPES
            )
        if name in LOGICAL:
            given = tuple(
                a if a.dtype == torch.bool else self.op("ne", a, self.make("zero", (), 0, a.dtype, False)) for a in args
            )
        elif name == "where":
            condition = args[0] if args[0].dtype == torch.bool else self.op("ne", args[0], self.const(0))
            given = (condition, self.cast(args[1], dtype), self.cast(args[2], dtype))
        else:
            given = tuple(self.cast(a, dtype) for a in args)
        result = torch.bool if name in COMPARISONS or name in LOGICAL else dtype
        return self.make(name, given, None, result, any(a.tensor for a in args))

    def again(self, e: Expr, made: Mapping[int, Expr]) -> Expr:
        """The same operation on what has been made of its arguments, by their `id`; a constant is itself."""
        if e.op == "const":
            return e
        return self.make(e.op, tuple(made[id(a)] for a in e.args), e.value, e.dtype, e.tensor)

    def reduce(self, name: str, x: Expr) -> Expr:
        """`sum`, `amax` or `amin` over all elements of one member's tensor: a scalar."""
        if not x.tensor:
            return self.cast(x, torch.float64)
        return self.make(name, (x,), None, torch.float64, False)


def rebuilt(
    root: Expr,
    made: dict[int, Expr],
    below: Callable[[Expr], Sequence[Expr]],
    copy: Callable[[Expr, Sequence[Expr]], Expr],
) -> Expr:
    """Copy `root` from its arguments up, without recursion: formulas are deeper than Python's stack.

    Args:
        made: copies by the `id` of their originals; gets those that are made now.
        below: the expressions to copy before one is copied, in order.
        copy: an expression, and the originals that `below` gave -> its copy.
    """
    waiting = [root]
    while waiting:
        e = waiting[-1]
        args = below(e)
        missing = [a for a in args if id(a) not in made]
        if missing:
            waiting += reversed(missing)
        else:
            waiting.pop()
            if id(e) not in made:
                made[id(e)] = copy(e, args)
    return made[id(root)]


def uncast(e: Expr) -> Expr:
    """An expression without the casts around it."""
    while e.op == "cast":
        e = e.args[0]
    return e


COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "isfinite")
LOGICAL = ("and", "or", "not", "xor")
# named alike in ATen and in C
C_FUNCTIONS = (
    "sqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "floor", "ceil", "trunc",
)  # fmt: skip
COMMUTATIVE = ("add", "mul", "eq", "ne", "and", "or", "xor")


def postorder(roots: Sequence[Expr], until: Collection[str] = ()) -> list[Expr]:
    """Every expression below `roots` once, arguments first; what is below operations in `until` is left out."""
    seen: set[int] = set()
    found: list[Expr] = []
    stack = list(reversed(roots))
    while stack:
        e = stack[-1]
        if id(e) in seen:
            stack.pop()
            continue
        waiting = [a for a in e.args if id(a) not in seen] if e.op not in until else []
        if waiting:
            waiting.reverse()
            stack += waiting
        else:
            seen.add(id(e))
            found.append(e)
            stack.pop()
    return found
