"""`_foreach_` operations are the plain ones on every element of their lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.passes.group import group
from tests.support.graphs import check, traced

pytestmark = pytest.mark.usefixtures("shipped_kernels")

FOREACH = sorted(
    n for n in dir(torch) if n.startswith("_foreach_") and n.removeprefix("_foreach_").rstrip("_") in {*ROWS, *SHAPED}
)
# what a list operation is called with; strings are lists of tensors, "s" a 0-dim tensor, a list one number per element
_CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("x",), {}),
    (("x", "y"), {}),
    (("x", 0.3), {}),
    (("x", [0.3, 0.7]), {}),
    (("x", "s"), {}),
    (("x", "y"), {"alpha": 0.3}),
    (("x", "y", "z"), {}),
    (("x", "y", 0.3), {}),
    (("x", "y", "z"), {"value": 0.3}),
    (("x", "y", "z"), {"value": [0.3, 0.7]}),
    ((0.3, "x"), {}),
]


def _plain(name: str) -> Callable[..., Any]:
    """The operation on one tensor; the list forms of maximum and minimum also take numbers."""
    if name.rstrip("_") in ("maximum", "minimum"):

        def bound(x: Any, y: Any) -> Any:
            number = {"maximum": torch.clamp_min, "minimum": torch.clamp_max}[name.rstrip("_")]
            return (number if isinstance(y, float) else getattr(torch, name.rstrip("_")))(x, y)

        return (lambda x, y: x.copy_(bound(x, y))) if name.endswith("_") else bound
    if name.endswith("_"):
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    return getattr(torch, name)


def _read(function: Callable[..., Any], *tensors: Tensor) -> list[str]:
    """The formulas of a function, and what it leaves unfused for which reasons."""
    captured = capture(traced(function, *tensors))
    return [*sorted({u.text for u in captured.unfused}), *(g.formula.text for g in group(captured).groups)]


@pytest.mark.parametrize("name", FOREACH)
def test_a_list_operation_is_the_plain_one_on_every_element(name):
    """The formulas are compared, of which the tests above show that they compute what torch does."""
    tensors = [*(torch.rand(n) + 1 for _ in range(3) for n in (5, 7)), torch.tensor(0.7)]
    several, single = getattr(torch, name), _plain(name.removeprefix("_foreach_"))
    known = 0
    for args, kwargs in _CALLS:

        def lists(*t: Any, args: Any = args, kwargs: Any = kwargs) -> None:
            named = {"x": list(t[0:2]), "y": list(t[2:4]), "z": list(t[4:6]), "s": t[6]}
            given = [named.get(a, a) if isinstance(a, str) else a for a in args]
            given += [v for v in kwargs.values() if isinstance(v, list)]  # a list of values is positional
            made = several(*given, **{k: v for k, v in kwargs.items() if not isinstance(v, list)})
            for i in range(0 if name.endswith("_") else 2):
                t[i].copy_(made[i])

        def elements(*t: Any, args: Any = args, kwargs: Any = kwargs) -> None:
            named = [{"x": t[i], "y": t[2 + i], "z": t[4 + i], "s": t[6]} for i in range(2)]
            made = [
                single(
                    *(named[i][a] if isinstance(a, str) else a[i] if isinstance(a, list) else a for a in args),
                    **{k: v[i] if isinstance(v, list) else v for k, v in kwargs.items()},
                )
                for i in range(2)
            ]
            for i in range(0 if name.endswith("_") else 2):
                t[i].copy_(made[i])

        try:
            lists(*(t.clone() for t in tensors))
        except (TypeError, RuntimeError):
            continue  # torch has no such form
        assert _read(lists, *tensors) == _read(elements, *tensors), (args, kwargs)
        known += 1
    assert known


def test_list_operations_compute_what_torchs_do():
    def compute(p0: Any, p1: Any, g0: Any, g1: Any, m0: Any, m1: Any, s: Any) -> None:
        p, g, m = [p0, p1], [g0, g1], [m0, m1]
        torch._foreach_mul_(m, 0.9)
        torch._foreach_add_(m, g, alpha=0.1)
        root = torch._foreach_sqrt(torch._foreach_abs(m))
        torch._foreach_add_(root, s)
        torch._foreach_addcdiv_(p, g, root, [0.3, -0.7])
        torch._foreach_clamp_max_(p, 1.5)

    torch.manual_seed(0)
    shapes = [(5,), (7, 3)]
    tensors: list[Tensor] = [torch.randn(shape) for _ in range(3) for shape in shapes]
    _, groups = check(compute, *tensors, torch.tensor(0.3, dtype=torch.float64), tolerance=1e-6)
    assert [len(g.members) for g in groups] == [2]
