"""torch.optim's own classes as update rules on NPUs: `compile_step` of them needs no Dynamo; states are their own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import harness
import pytest
import torch
from layouts import SHAPES, Parameters, Twins, flat_parameters
from steps import assert_close, parameters

import npu_fuse_pass
from tests.support.torch_rules import STOCK, assert_same_states

pytestmark = pytest.mark.usefixtures("afresh")


class RuleTwins(Twins):
    """`Twins` by `compile_step`."""

    def __init__(self, name: str, parameters: Callable[[], Parameters]) -> None:
        super().__init__(STOCK[name], parameters)
        self._step = npu_fuse_pass.compile_step(self.ours, platform="npu", strict=True)

    def compare(self) -> None:
        for p, q in zip(*self.both, strict=True):
            assert_close(p, q, 5e-6)  # of some steps, each within 1e-6
        assert_same_states(self.ours, self.eager)

    def is_a_rule(self) -> None:
        """All that was compiled is one rule, for a single group in GE."""
        (report,) = npu_fuse_pass.reports()
        assert report.replaces == f"torch.optim.{type(self.ours).__name__}" and report.no_rule is None
        assert report.fallback is None and not report.unfused
        assert [(row.lowering, row.updates) for row in report.groups] == [("npu", len(self.both[0]))]


def apart() -> Parameters:
    return parameters(shapes=SHAPES)


def adjacent() -> Parameters:
    return flat_parameters(len(SHAPES))


@pytest.mark.parametrize("make", [apart, adjacent])
@pytest.mark.parametrize("name", STOCK)
def test_one_compile_whatever_happens_between_steps(name: str, make: Callable[[], Parameters]) -> None:
    twins = RuleTwins(name, make)
    twins.step(0)
    twins.step(1, missing=(1,))
    twins.step(2, change=lambda opt, _: opt.param_groups[0].update(lr=0.03))
    twins.step(3, change=lambda opt, _: opt.load_state_dict(copy.deepcopy(opt.state_dict())))
    twins.step(4, change=lambda _, params: [setattr(p, "data", p.data.clone()) for p in params])
    twins.step(5, order=range(len(SHAPES)))
    twins.is_a_rule()


def test_an_eager_step_between_compiled_ones() -> None:
    twins = RuleTwins("Adam", apart)
    twins.step(0)
    twins.change(lambda opt, _: opt.step())
    twins.step(1)
    twins.is_a_rule()


def test_groups_of_their_own_numbers() -> None:
    twins = RuleTwins("AdamW", apart)
    twins.step(0)
    more = parameters(shapes=[(3, 2), (3, 2)])
    twins.change(lambda opt, params: params.extend(copy.deepcopy(more)))
    twins.change(lambda opt, params: opt.add_param_group({"params": params[-2:], "lr": 0.3, "weight_decay": 0.0}))
    twins.step(1)
    twins.step(2, missing=(5,))
    report = npu_fuse_pass.reports()[-1]
    assert report.replaces == "torch.optim.AdamW" and [row.updates for row in report.groups] == [7]


def test_what_no_rule_computes_is_captured() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    params[0].grad = torch.ones_like(params[0])
    with harness.record():
        npu_fuse_pass.compile_step(torch.optim.SGD(params, lr=0.1), platform="npu")()
    report = npu_fuse_pass.reports()[-1]
    assert report.no_rule is not None and "torch.bfloat16" in report.no_rule.text
    assert [row.lowering for row in report.groups] == ["npu"]


def test_a_device_that_no_rule_is_proved_on() -> None:
    params = [torch.nn.Parameter(torch.ones(3, device="meta"))]
    params[0].grad = torch.ones_like(params[0])
    with pytest.warns(UserWarning, match="on meta"):
        npu_fuse_pass.compile_step(torch.optim.SGD(params, lr=0.1))()
    no_rule = npu_fuse_pass.reports()[-1].no_rule
    assert no_rule is not None and "on meta" in no_rule.text
