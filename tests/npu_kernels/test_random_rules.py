"""Random rules: kernels compute what eager does, or there is a reason that says which operation has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS
from tests.behaviour import test_properties_rules as rules
from tests.npu_kernels.executed import RuleStep, captured_rules, generated_groups
from tests.support.rules_noise import assert_within
from tests.support.rules_programs import Program
from tests.support.rules_strategy import programs


@pytest.mark.slow
def test_computed_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler accepts them all; whether a rule reads its total is left to chance."""
    monkeypatch.setattr(rules, "DTYPES", [*rules.DTYPES[:4], torch.float32, torch.bfloat16])
    found: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def check(problem: tuple[Program, Sequence[float]]) -> None:
        made, seed = rules.rule_of(*problem), len(problem[0].statements)
        (wanted, grads), (got, _) = (rules.setting(seed) for _ in range(2))
        opt = rules.optimizer(made, got)
        for p, grad in zip(got, grads[0], strict=True):
            p.grad = grad
        try:
            generated_groups(captured_rules(opt), size=512)
        except Unsupported as e:
            found[e.reason.op] += 1
            return
        rules.run(got, grads, RuleStep(opt, blocks=3, size=512).step)
        rules.run(wanted, grads, rules.optimizer(made, wanted).step)
        limits = rules.limits_of(*problem, seed)
        assert_within([p.detach() for p in got], [p.detach() for p in wanted], limits, problem[0])
        found["computed"] += 1

    check()
    assert found.pop("computed") > 30
    assert found.keys() <= REASONS.keys()
