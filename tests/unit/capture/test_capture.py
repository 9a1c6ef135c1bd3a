"""Stage 1, capture: what is read from a graph, and the reason where something cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.ir import expr
from npu_fuse_pass.ir import text as formula_text
from npu_fuse_pass.passes.group import group
from tests.support.graphs import check, fused, run, traced, with_groups


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def momentum(lr: Any, p: Any, g: Any, m: Any) -> None:
    """SGD with momentum, in place."""
    m.mul_(0.9).add_(g)
    p.sub_(lr * m)


def momentum_functional(lr: Any, p: Any, g: Any, m: Any) -> None:
    """The same as AOTAutograd writes it."""
    new_m = torch.ops.aten.add.Tensor(torch.ops.aten.mul.Tensor(m, 0.9), g)
    new_p = torch.ops.aten.sub.Tensor(p, torch.ops.aten.mul.Tensor(lr, new_m))
    torch.ops.aten.copy_.default(p, new_p)
    torch.ops.aten.copy_.default(m, new_m)


MOMENTUM = """\
slot 0: f32
slot 1: scalar
slot 2: f32
slot 3: f32
slot 4: scalar
%0: f32 = cast($1, f32)
%1: f32[] = mul(%0, $2)
%2: f32[] = add($0, %1)
%3: f32 = cast($4, f32)
%4: f32[] = mul(%2, %3)
%5: f32[] = sub($3, %4)
write $2 = %2
write $3 = %5"""

pytestmark = pytest.mark.usefixtures("same_numbers")


def example(n: int = 5) -> list[Tensor]:
    return [f64(0.1), *(torch.randn(n) for _ in range(3))]


def text(function: Any, *tensors: Tensor) -> str:
    (only,) = fused(function, *tensors)[1]
    return only.formula.text


def test_golden_text_of_a_formula():
    """Slots in the order of their first use; the number 0.9 and lr are slots; the same in every process."""
    assert text(momentum, *example()) == MOMENTUM
    assert formula_text.parse(MOMENTUM).text == MOMENTUM


def test_functional_graphs_with_copies_are_the_same_update():
    """The two forms of one step, and the one that make_fx traces."""
    by_make_fx = make_fx(momentum, tracing_mode="fake")(*example())
    texts = {text(momentum, *example()), text(momentum_functional, *example())}
    assert {g.formula.text for g in group(capture(by_make_fx)).groups} == texts and len(texts) == 1


def test_what_is_read_is_the_value_of_that_moment():
    """Old values stay readable through clones, new ones through aliases; writes in any order."""

    def out_of_order(p: Any, g: Any, m: Any) -> None:
        old = p.clone()
        alias = p.detach()
        p.add_(g)
        m.copy_(old * alias)  # old p times new p
        alias.mul_(2)  # reaches p
        g.copy_(p - old)
        p.sub_(m)

    def swap(p: Any, g: Any) -> None:
        old = p.clone()
        p.copy_(g)
        g.copy_(old)

    def same_tensor_twice(p: Any) -> None:
        p.mul_(p).add_(p, alpha=0.5)

    check(out_of_order, *(torch.randn(9) for _ in range(3)))
    check(swap, torch.randn(9), torch.randn(9))
    check(same_tensor_twice, torch.randn(9))


def test_equal_subexpressions_are_one_and_numbers_are_never_shared():
    def step(p: Any, g: Any) -> None:
        p.copy_(torch.sqrt(p * g + 0.5) + torch.sqrt(p * g + 0.5) * 0.5)

    captured, groups = fused(step, torch.rand(5), torch.rand(5))
    exprs = list(expr.postorder(groups[0].formula.roots))
    ops = [e.op for e in exprs]
    assert ops.count("mul") == 2, "p * g, which is written twice, and the product with 0.5"
    assert ops.count("sqrt") == 2 and ops.count("leaf") == 5, "the two numbers 0.5 in the sums stay two slots"
    b = expr.Builder()
    x = b.leaf(0, torch.float32, True)
    assert b.op("add", x, x) is b.op("add", x, x)
    assert b.const(0.5) is not b.const(0.5)
    assert captured.updates[0].members == [(0, 1)]


_NAMES = ("a", "b", "c")
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add_", "sub_", "mul_", "copy_", "maximum", "alias", "clone", "halve_", "assign"]),
        st.sampled_from(_NAMES),
        st.sampled_from((*_NAMES, "alias", "clone")),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_STEPS)
def test_random_programs_of_in_place_operations(steps):
    """Any sequence of in-place operations, aliases and clones leaves what torch leaves (exactly)."""

    def program(*tensors: Any) -> None:
        env = dict(zip((*_NAMES, "alias", "clone"), (*tensors, tensors[0], tensors[1] + 0), strict=True))
        for op, target, source in steps:
            x, y = env[target], env[source]
            if op == "alias":
                env["alias"] = x.detach()
            elif op == "clone":
                env["clone"] = x.clone()
            elif op == "maximum":
                env["clone"] = torch.maximum(x, y)
            elif op == "halve_":
                x.mul_(0.5)
            elif op == "assign":
                x.copy_(y * 0.25 + x)
            else:
                getattr(x, op)(y)

    tensors = [torch.tensor([1.0, -2.0, 3.5]) * k for k in (1, 2, 3)]
    captured = capture(traced(program, *tensors))
    assert not captured.unfused
    wanted, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
    program(*wanted)
    run(*with_groups(captured), got, "interpreter")
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())


def test_a_learning_rate_that_became_dynamic():
    """A float64 placeholder that is read with item(): a scalar slot, in float64 until it meets a tensor."""

    def step(lr: Any, p: Any, g: Any) -> None:
        p.sub_(g * (lr.item() / 3))

    _, groups = check(step, f64(0.1), torch.randn(5), torch.randn(5))
    assert [str(s) for s in groups[0].formula.slots].count("scalar") == 2
    assert "div" in groups[0].formula.text


def test_graph_outputs_are_new_tensors_that_the_kernel_writes():
    """The first step of SGD with momentum returns its new buffer."""

    def first(lr: Any, p: Any, g: Any) -> Any:
        buffer = torch.clone(g).detach()
        p.sub_(lr * buffer)
        return buffer, p.sum(), p, buffer

    captured, groups = check(first, f64(0.1), torch.randn(3, 4), torch.randn(3, 4), tolerance=1e-6)
    assert captured.returned[0] == captured.returned[3] and captured.returned[2].leaf == 1
    assert len(groups) == 1


def test_constant_outputs():
    def step(s: Any, p: Any) -> Any:
        p.mul_(s)
        return torch.zeros_like(p), torch.full_like(p, 2.0)

    check(step, torch.tensor(2.0), torch.randn(6))


def test_tensors_that_are_only_filled():
    def step(p: Any, g: Any, m: Any) -> None:
        p.sub_(g)
        g.zero_()
        m.fill_(0.5)

    check(step, torch.randn(6), torch.randn(6), torch.randn(6))


def test_a_0_dim_result_keeps_its_dtype():
    (got,) = run(*fused(lambda s: s * 2, torch.tensor(2.0)), [torch.tensor(2.0)], "kernel")
    assert got.dtype == torch.float32


def test_0_dim_parameters():
    """They are computed in float64 and rounded once, so they may differ by torch's own roundings."""
    for dtype in (torch.float32, torch.float64):
        check(momentum, f64(0.1), *(torch.rand((), dtype=dtype) + k for k in (3, 1, 1)), tolerance=2e-7)


def test_empty_tensors():
    check(momentum, *example(0))
