"""Converters for what torchair lacks and what stays around fused groups; those that torchair has are kept."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.environment import require
from npu_fuse_pass.lowerings.npu.graph import list_converters

ATEN = torch.ops.aten
X, Y, WIDE = torch.tensor([[-1.5, 0.25, 3.0]]), torch.tensor([2.0, -0.5]), torch.ones(2, 3)
# what is converted -> inputs, and the compute nodes that it becomes
CASES: dict[str, tuple[Callable[..., Any], Sequence[Tensor], dict[str, int]]] = {
    "sqrt": (lambda x, y: ATEN._foreach_sqrt([x, y]), [X.abs(), Y.abs().bfloat16()], {"Sqrt": 2}),
    "neg": (lambda x, y: ATEN._foreach_neg([x, y]), [X, Y.bfloat16()], {"Neg": 2}),
    "reciprocal": (lambda x, y: ATEN._foreach_reciprocal([x, y]), [X, Y.bfloat16()], {"Reciprocal": 2}),
    "sign": (lambda x, y: ATEN._foreach_sign([x, y]), [X, Y.bfloat16()], {"Sign": 2, "Cast": 2}),
    "sign, half": (lambda x, y: ATEN._foreach_sign([x, y]), [X, Y.half()], {"Sign": 2}),
    "copy": (lambda x, y, a, b: ATEN._foreach_copy([x, y], [a, b]), [X, Y, X + 1, Y - 1], {}),
    "copy, dtype and shape": (
        lambda x, y, a, b: ATEN._foreach_copy([x, y], [a, b]),
        [X.half(), WIDE, X + 1, X],
        {"Cast": 1, "BroadcastTo": 1},
    ),
    "fma": (lambda a, b, c: [torch.ops.prims.fma(a, b, c)], [X, X + 1, X - 2], {"Mul": 1, "Add": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_torchair_lacks(name: str) -> None:
    function, tensors, nodes = CASES[name]
    require()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
    gm = make_fx(lambda *args: tuple(function(*args)))(*fakes)
    with harness.record() as graphs:
        got = harness.convert(gm, mode)(*tensors)
    assert {k: v for k, v in graphs[0].counts().items() if k not in harness.NOT_COMPUTE} == nodes
    assert set(nodes) <= set(elementwise.DOCUMENTS)
    for g, w in zip(got, function(*tensors), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-7)


def test_every_operation_of_the_table_is_tested() -> None:
    require()
    assert len(list_converters.REPLACED) == len({name.partition(",")[0] for name in CASES})


def test_a_converter_of_torchairs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a later torchair brings for an operation of our table."""
    torchair = require()
    from torchair._ge_concrete_graph import ge_apis

    assert not list_converters.lacks(ATEN.sqrt.default) and list_converters.lacks(ATEN._foreach_sqrt.out)
    op = ATEN._foreach_neg.default
    monkeypatch.setattr(op, "_ge_converter", op._ge_converter)  # put back at the end

    def theirs(self: Any, meta_outputs: Any = None) -> Any:
        return self

    torchair.register_fx_node_ge_converter(op)(theirs)
    list_converters.register(torchair, ge_apis)
    assert op._ge_converter.__wrapped__ is theirs


PROGRAM = """
import sys, torch
sys.path[:0] = {paths!r}
import harness, npu_fuse_pass, steps
harness.prepare()
import torchair

def by_rows(params, grads, factors):
    rows = torch._foreach_sqrt([g.square().sum(1, keepdim=True) for g in grads])
    for factor, row in zip(factors, rows):
        factor.add_(row)
    updates = torch._foreach_neg([r * g for r, g in zip(torch._foreach_reciprocal(rows), grads)])
    for p, u, g in zip(params, updates, grads):
        p.addcmul_(u, g, value=0.1)

def tensors():
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(4, 4, generator=generator) for _ in range(2)] for _ in range(2)]
    return *made, [torch.ones(4, 4) for _ in range(2)]

config = torchair.CompilerConfig()
config.post_grad_custom_pre_pass = npu_fuse_pass.fuse_pass
with harness.record() as graphs:
    ours, eager = tensors(), tensors()
    torch.compile(by_rows, backend=torchair.get_npu_backend(compiler_config=config), dynamic=False)(*ours)
    by_rows(*eager)
report = npu_fuse_pass.reports()[-1]
assert report.groups and report.unfused and report.fallback is None, report
for p, q in zip(ours[0] + ours[2], eager[0] + eager[2]):
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
"""


def test_fuse_pass_is_all_that_a_torchair_flow_needs() -> None:
    """In a fresh process: the hook itself gives torchair the converters of the fused nodes and of what stays."""
    here = pathlib.Path(__file__).parent
    program = PROGRAM.format(paths=[str(here), str(here.parent.parent)])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
