"""GE's Foreach operations, one launch for up to 50 tensors: the used ones, their chips and purpose.

Where a group has no dedicated operation and its tensors are not adjacent, an expression over n members is n elementwise
operations, or one of these. They move the same bytes, so that they win where tensors are small: a task on the device
takes some microseconds however little it does.

Documents are foreach/<operation>/README.md and op_graph/<operation>_proto.h in https://gitcode.com/cann/ops-nn. They
agree in what matters here: Atlas A2 and A3, never the Atlas training series; float32; at most 50 tensors in a list (the
prototypes); numbers are inputs, tensors with one element for all of a list. Their kernels' definitions
(op_host/<operation>_def.cpp) name ascend910b and ascend910_93. The forms with a number for each tensor (ScalarList) are
not used: the prototypes in torch_npu's wheel contradict their documents. There is no list operation for casts,
comparisons, `where` and reductions. All of these stay one for each tensor. Half precision has as many casts as there
are tensors, and torchair's shape inference stumbles over a cast behind a list operation, so groups with other dtypes
than float32 have no lists.
"""

from __future__ import annotations

import dataclasses

from npu_fuse_pass.lowerings.npu.emit.dedicated_operations import A2, A3

SERIES = (A2, A3)
LONGEST = 50
KERNEL = "GE Foreach lists"
_DOCUMENT = "https://gitcode.com/cann/ops-nn, foreach: its README.md and _proto.h"


@dataclasses.dataclass(frozen=True)
class ListOperation:
    """One GE operation on lists.

    Attributes:
        name: GE's type.
        inputs: names in its prototype -> an operand's position, or "one", the number 1.
    """

    name: str
    inputs: dict[str, int | str]


_PAIR: dict[str, int | str] = {"x1": 0, "x2": 1}
_WITH_ONE: dict[str, int | str] = {**_PAIR, "alpha": "one"}

# An operation of the IR, and what its operands are: t a list of tensors, s a number for all of them.
# Operands that commute are ordered so.
LISTS: dict[tuple[str, str], ListOperation] = {
    ("add", "tt"): ListOperation("ForeachAddList", _WITH_ONE),
    ("sub", "tt"): ListOperation("ForeachSubList", _WITH_ONE),
    ("mul", "tt"): ListOperation("ForeachMulList", _PAIR),
    ("div", "tt"): ListOperation("ForeachDivList", _PAIR),
    ("maximum", "tt"): ListOperation("ForeachMaximumList", _PAIR),
    ("minimum", "tt"): ListOperation("ForeachMinimumList", _PAIR),
    ("fma", "tst"): ListOperation("ForeachAddList", {"x1": 2, "x2": 0, "alpha": 1}),
    ("fma", "ttt"): ListOperation("ForeachAddcmulScalar", {"x1": 2, "x2": 0, "x3": 1, "scalar": "one"}),
    ("lerp", "tts"): ListOperation("ForeachLerpScalar", {**_PAIR, "weight": 2}),
    **{
        (op, "ts"): ListOperation(f"Foreach{name}Scalar", {"x": 0, "scalar": 1})
        for op, name in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}.items()
    },
    **{
        (op, "t"): ListOperation(f"Foreach{name}", {"x": 0})
        for op, name in {"sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "reciprocal": "Reciprocal"}.items()
    },
}
COMMUTING = {"add": (0, 1), "mul": (0, 1), "maximum": (0, 1), "minimum": (0, 1), "fma": (0, 1)}

DOCUMENTS = {row.name: _DOCUMENT for row in LISTS.values()}
