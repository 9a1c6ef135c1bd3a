"""The functional form: AOTAutograd's graphs give the groups and formulas of Dynamo's, and `fuse_pass` rewrites them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import npu_fuse_pass
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.ir.fused_op import multi_tensor_update
from npu_fuse_pass.lowerings.cpu.graph_op import multi_tensor_kernel
from npu_fuse_pass.passes.group import group
from tests.support.training import clones, error, parameters, profiled, train

OPTIM = torch.optim
STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (OPTIM.Adam, {}),
    "Adam amsgrad": (OPTIM.Adam, dict(amsgrad=True, weight_decay=0.1)),
    "AdamW": (OPTIM.AdamW, {}),
    "SGD": (OPTIM.SGD, {}),
    "SGD momentum": (OPTIM.SGD, dict(momentum=0.9, nesterov=True)),
    "RMSprop": (OPTIM.RMSprop, dict(centered=True, momentum=0.5)),
    "Adagrad": (OPTIM.Adagrad, {}),
    "Adadelta": (OPTIM.Adadelta, {}),
    "Adamax": (OPTIM.Adamax, {}),
    "NAdam": (OPTIM.NAdam, {}),
    "RAdam": (OPTIM.RAdam, {}),
    "Rprop": (OPTIM.Rprop, {}),
    "ASGD": (OPTIM.ASGD, {}),
}
FOREACH = pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
SHAPES = ((3, 4), (5,), (2, 3, 2), (5,))

pytestmark = pytest.mark.usefixtures("afresh")


def steps(opt: Any, params: list[Any], backend: Any, count: int = 3) -> None:
    step = torch.compile(opt.step, backend=backend) if backend is not None else opt.step
    train(params, step, seeds=range(count))


class Both:
    """A backend that captures each graph in both forms, and runs it through AOTAutograd."""

    def __init__(self) -> None:
        self.dynamo: list[Any] = []
        self.functional: list[Any] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.dynamo.append(_groups(gm))
        return aot_autograd(fw_compiler=self._functional, keep_inference_input_mutations=True)(gm, inputs)

    def _functional(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.functional.append(_groups(gm))
        return gm.forward


def _groups(gm: fx.GraphModule) -> list[tuple[str, int]]:
    captured = capture(gm)
    assert not captured.unfused, captured.unfused
    return sorted((g.formula.text, len(g.members)) for g in group(captured).groups)


@FOREACH
@pytest.mark.parametrize("name", STOCK)
def test_both_forms_are_the_same_groups(name: str, foreach: bool) -> None:
    cls, options = STOCK[name]
    params, both = parameters(SHAPES), Both()
    steps(cls(params, foreach=foreach, **options), params, both)
    assert both.dynamo and both.dynamo[-1] and both.functional == both.dynamo
    assert [count for _, count in both.functional[-1]] == [len(SHAPES)]


class Rewritten:
    """A backend: AOTAutograd, then `fuse_pass`, then the graph as it is."""

    def __init__(self, fuse_pass: Any = npu_fuse_pass.fuse_pass) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.fuse_pass = fuse_pass

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self._compile, keep_inference_input_mutations=True)(gm, inputs)

    def _compile(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.fuse_pass(gm, inputs, None)  # as torchair calls it
        self.graphs.append(gm)
        return gm.forward


def fused_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [
        n for t in (multi_tensor_update, multi_tensor_kernel) for n in graph.find_nodes(op="call_function", target=t)
    ]


def assert_rewritten(graph: fx.Graph, groups: int) -> None:
    """Fused nodes and `copy_`, and nothing that computes on tensors besides."""
    graph.lint()
    assert len(fused_nodes(graph)) == groups
    left = {n.target for n in graph.nodes if n.op == "call_function"} - {
        multi_tensor_update,
        multi_tensor_kernel,
        operator.getitem,
    }
    assert {str(target) for target in left} <= {
        "aten.copy_.default",
        "aten.scalar_tensor.default",
        "prims.convert_element_type.default",
    }


@FOREACH
@pytest.mark.parametrize("name", STOCK)
def test_a_rewritten_graph_steps_as_eager_does(name: str, foreach: bool) -> None:
    cls, options = STOCK[name]
    params = parameters(SHAPES)
    others = clones(params)
    backend = Rewritten()
    steps(cls(params, foreach=foreach, **options), params, backend)
    steps(cls(others, foreach=foreach, **options), others, None)
    for gm in backend.graphs:
        assert_rewritten(gm.graph, 1)
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5
    for report in npu_fuse_pass.reports():
        assert report.fallback is None and not report.unfused
        assert [(g.updates, g.lowering) for g in report.groups] == [(len(SHAPES), "graph")]
    assert npu_fuse_pass.reports()


# What is left alone ---------------------------------------------------------------------------------------------------


def _functional(function: Callable[..., Any], *tensors: Tensor) -> fx.GraphModule:
    """The graph of a function on fake tensors, without in-place operations but `copy_` to arguments."""
    return make_fx(torch.func.functionalize(function, remove="mutations"), tracing_mode="fake")(*tensors)


def _forward(w: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    y = x @ w
    mean.copy_(mean * 0.9 + y.mean(0) * 0.1)
    return torch.relu(y - mean)


UNTOUCHED: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "forward with running statistics": (_forward, [(4, 3), (5, 4), (3,)]),
    "pointwise": (lambda x, y: torch.relu(x * y), [(4,), (4,)]),
    "gradients": (lambda x, y: (x * y.cos(), x.sin()), [(4,), (4,)]),
    "nothing": (lambda x: x, [(4,)]),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_graphs_that_are_no_step_stay_as_they_are(name: str) -> None:
    """A hook is called for every graph that is compiled: models, their gradients, steps."""
    function, shapes = UNTOUCHED[name]
    gm = _functional(function, *(torch.randn(s) for s in shapes))
    before = str(gm.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npu_fuse_pass.fuse_pass(gm.graph)
    assert str(gm.graph) == before and not npu_fuse_pass.reports()


def test_symbolic_sizes_stay_symbolic() -> None:
    """Looking at a size would fix it for all calls."""
    function = torch.func.functionalize(_forward, remove="mutations")
    gm = make_fx(function, tracing_mode="symbolic")(torch.randn(4, 3), torch.randn(5, 4), torch.randn(3))
    (mode,) = {
        n.meta["val"].fake_mode for n in gm.graph.find_nodes(op="placeholder") if hasattr(n.meta["val"], "fake_mode")
    }
    before, guards = str(gm.graph), len(mode.shape_env.guards)
    npu_fuse_pass.fuse_pass(gm.graph)
    assert str(gm.graph) == before and len(mode.shape_env.guards) == guards and not npu_fuse_pass.reports()


def _partly(p: Tensor, g: Tensor) -> None:
    p.sub_((g @ g * 0.1 + g) * 0.5)


def test_original_operations_stay_between_fused_nodes() -> None:
    """As in Muon: a matrix product of what one fused node gives, which another one reads."""
    p, g = torch.randn(3, 3), torch.randn(3, 3)
    gm = _functional(_partly, p, g)
    npu_fuse_pass.fuse_pass(gm)
    (report,) = npu_fuse_pass.reports()
    assert report.fallback is None and [u.op for u in report.unfused] == ["mm"]
    assert [n.target for n in gm.graph.nodes].count(torch.ops.aten.mm.default) == 1 and fused_nodes(gm.graph)
    got, wanted = p.clone(), p.clone()
    gm(got, g)
    _partly(wanted, g)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    strict = _functional(_partly, p, g)
    with pytest.raises(npu_fuse_pass.UnfusedError, match="mm"):
        npu_fuse_pass.FusePass(strict=True)(strict)
    assert not fused_nodes(strict.graph)


def test_what_a_step_returns_is_returned() -> None:
    """New tensors, numbers and arguments, each in its place."""

    def step(p: Tensor, g: Tensor) -> Any:
        buffer = g * 0.5
        p.sub_(buffer)
        return p, None, buffer, 3

    p, g = torch.randn(5), torch.randn(5)
    gm = _functional(step, p, g)
    npu_fuse_pass.fuse_pass(gm)
    assert_rewritten(gm.graph, 1)
    got, wanted = p.clone(), p.clone()
    results, expected = gm(got, g), step(wanted, g)
    assert torch.equal(got, wanted) and torch.equal(results[0], wanted) and torch.equal(results[2], expected[2])
    assert results[1] is None and results[3] == 3


@pytest.mark.parametrize("name", ["Adam", "SGD momentum", "NAdam", "Rprop"])
def test_the_kernel_operation_is_the_node(name: str) -> None:
    """What Inductor runs for a fused node on a CPU, against the node's own semantics: new values, nothing written."""
    backend = Rewritten()
    cls, options = STOCK[name]
    params = parameters(SHAPES)
    steps(cls(params, **options), params, backend)
    (node,) = fused_nodes(backend.graphs[-1].graph)
    generator = torch.Generator().manual_seed(0)

    def example(n: fx.Node) -> Tensor:
        value = n.meta["val"]
        if n.target is torch.ops.aten.scalar_tensor.default:
            return torch.tensor(n.args[0], dtype=torch.float64)
        return torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * 0.8 + 0.1

    tensors, scalars, members, formula = fx.node.map_arg(node.args, example)
    before = [t.clone() for t in (*tensors, *scalars)]
    kernels, _ = profiled(lambda: multi_tensor_kernel(tensors, scalars, members, formula))
    assert kernels == [node.name], "the generated kernel ran"
    got, wanted = (
        multi_tensor_kernel(tensors, scalars, members, formula),
        multi_tensor_update(tensors, scalars, members, formula),
    )
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, *scalars), strict=True))
