"""Stage 1, capture: operators called as methods, in place and reflected, and what writes without saying so by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import npu_fuse_pass
from tests.support.training import last_report

REFLECTED = {"add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"}
REFLECTED |= {"lshift", "rshift"}
FUSED = REFLECTED - {"matmul", "and", "or", "xor", "lshift", "rshift"}  # those need other dtypes, or matrices
FLOATS = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(autouse=True)
def _compile_afresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def values(dtype: torch.dtype) -> list[Tensor]:
    """Three matrices of numbers from 1 to 4."""
    return [(1 + 3 * torch.rand(4, 4, dtype=torch.float64)).to(dtype) for _ in range(3)]


def compare(function: Callable[..., Any], tensors: list[Tensor]) -> Any:
    """A function writes the same compiled as eagerly, to one rounding; returns the report."""
    wanted = [t.clone() for t in tensors]
    function(*wanted)
    npu_fuse_pass.clear_reports()
    torch.compile(function, backend="npu_fused", fullgraph=True)(*tensors)
    for i, (a, b) in enumerate(zip(tensors, wanted, strict=True)):
        limit = 0 if not b.dtype.is_floating_point else torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=limit, atol=0, msg=lambda m, i=i: f"tensor {i}: {m}")
    return last_report()


def test_the_names_below_are_all_there_are() -> None:
    """A reflected method that torch adds one day fails here first."""
    names = {n for n in dir(torch.Tensor) if n.startswith("__r") and hasattr(operator, f"__{n[3:]}")}
    assert names | {"__rdiv__"} == {f"__r{n}__" for n in REFLECTED}


@pytest.mark.parametrize("other", ["number", "tensor", "0-dim"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(FUSED))
def test_reflected(name: str, dtype: torch.dtype, other: str) -> None:
    """`p.__rsub__(x)` is x - p, fused."""

    def step(p: Tensor, q: Tensor, out: Tensor, s: Tensor) -> None:
        out.copy_(getattr(p, f"__r{name}__")({"number": 2.5, "tensor": q, "0-dim": s}[other]))

    tensors = [*values(dtype), torch.tensor(2.5, dtype=torch.float64)]
    try:
        step(*(t.clone() for t in tensors))
    except (TypeError, NotImplementedError):
        pytest.fail("torch itself refuses this: it has no place in this test")
    report = compare(step, tensors)
    if not (dtype == torch.bfloat16 and name == "floordiv"):  # rounds in between: left to the original, with a reason
        assert [g.updates for g in report.groups] == [1] and not report.unfused and report.fallback is None, report


@pytest.mark.parametrize("name", sorted(REFLECTED - FUSED))
@pytest.mark.filterwarnings("ignore:npu_fused")
def test_reflected_on_other_tensors(name: str) -> None:
    """Matrices and integers stay, with a reason; bools fuse."""
    given = values(torch.float32)
    x, y = given[:2] if name == "matmul" else [t.round().to(torch.int64) for t in given[:2]]
    if name in ("and", "or", "xor"):
        x, y = x > 2, y > 2

    def step(p: Tensor, q: Tensor, out: Tensor) -> None:
        out.copy_(getattr(p, f"__r{name}__")(q))

    report = compare(step, [x, y, given[2]])
    assert report.groups, report
    assert bool(report.unfused) == (name in ("matmul", "lshift", "rshift")), report


@pytest.mark.parametrize("as_method", [True, False], ids=["method", "operator"])
@pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"])
def test_in_place(name: str, as_method: bool) -> None:
    """`p.__iadd__(x)` and `p += x` write p; what is read afterwards is the new value."""

    def step(p: Tensor, q: Tensor, out: Tensor) -> None:
        p = getattr(p, f"__{name}__")(q) if as_method else getattr(operator, name)(p, q)
        out.copy_(p * 2)

    report = compare(step, values(torch.float32))
    assert [g.updates for g in report.groups] == [1] and not report.unfused, report


WHERE: dict[str, Callable[..., Any]] = {
    "tensors": lambda p, q: p.where(p > q, q),
    "a number": lambda p, q: p.where(p > q, 0.5),
    "named": lambda p, q: p.where(p > q, other=q),
    "of the class": lambda p, q: torch.Tensor.where(p, p > q, q),
    "of one element": lambda p, q: p[0, 0].where(p[0, 0] > q[0, 0], q[0, 0]),
    "stacked": lambda p, q: (v := torch.stack([p.sum(), q.sum()])).where(v > 30, 0.5)[0],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", WHERE)
@pytest.mark.filterwarnings("ignore:npu_fused")
def test_where_as_a_method(form: str, dtype: torch.dtype) -> None:
    """`p.where(condition, q)` takes p where the condition holds."""

    def step(p: Tensor, q: Tensor, out: Tensor) -> None:
        out.copy_(WHERE[form](p, q))

    report = compare(step, values(dtype))
    assert report.groups and "where" not in {u.op for u in report.unfused}, report


def _set_item(p: Tensor, q: Tensor, out: Tensor) -> None:
    p[0] = 1.0
    out.copy_(p * q)


WRITES_UNSAID: dict[str, Callable[..., Any]] = {
    "relu": lambda p, q, out: (F.relu(p.sub_(2), inplace=True), out.copy_(p * q))[:0],
    "relu by position": lambda p, q, out: (F.relu(p.sub_(2), True), out.copy_(p * q))[:0],
    "hardtanh": lambda p, q, out: (F.hardtanh(p, -2, 2, inplace=True), out.copy_(p * q))[:0],
    "__idiv__": lambda p, q, out: (p.__idiv__(q), out.copy_(p * q))[:0],
    "setitem": _set_item,
    "__setitem__": lambda p, q, out: (p.__setitem__(0, 1.0), out.copy_(p * q))[:0],
}


@pytest.mark.filterwarnings("ignore:npu_fused")
@pytest.mark.parametrize("name", WRITES_UNSAID)
def test_functions_that_write_without_saying_so(name: str) -> None:
    """What no name tells is found out: they write a tensor of the same value, whose content is taken over."""
    report = compare(WRITES_UNSAID[name], values(torch.float32))
    assert report.groups and report.fallback is None and report.unfused[0].text, report


def test_a_list_operation_that_cannot_fuse_for_its_last_tensor() -> None:
    """It stays original for all of them: what was read of the first ones is undone."""

    def step(p: Tensor, q: Tensor, out: Tensor) -> None:
        p.mul_(2)
        torch._foreach_add_([p, out], [q, q.to(torch.int32)])
        q.copy_(p * out)

    report = compare(step, values(torch.float32))
    assert report.groups and {u.op for u in report.unfused} == {"to", "_foreach_add_"}, report


class Rounds(torch.optim.Optimizer):
    """Counts in Python; a number that bfloat16 cannot hold multiplies its parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 256) + 1
            p.copy_(state["count"] * p.grad)


def test_a_number_that_became_dynamic_is_no_tensor() -> None:
    """From its second value on the counter is a number of the graph, which ATen does not round to bfloat16."""
    p = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    opt = Rounds([p])
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        from npu_fuse_pass.backend import npu_fused

        seen.extend(n for n in gm.graph.find_nodes(op="placeholder") if not isinstance(_example(n), Tensor))
        return npu_fused(gm, inputs)

    npu_fuse_pass.clear_reports()
    step = torch.compile(opt.step, backend=backend)
    for count in range(257, 262):
        p.grad = (1 + torch.rand(64)).bfloat16()
        step()
        assert torch.equal(p, count * p.grad), count
    assert seen, "no graph had a number among its arguments"
    assert not any(r.fallback or r.unfused for r in npu_fuse_pass.reports())


def _example(node: Any) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))
