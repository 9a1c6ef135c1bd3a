"""Random rules: the compiler accepts the kernels of each, or there is a reason that says which operation has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS
from tests.behaviour.test_properties_rules import optimizer, rule_of
from tests.npu_kernels.compiler import final_ir
from tests.npu_kernels.executed import captured_rules, generated_groups
from tests.npu_kernels.steps import parameters, set_gradients
from tests.support.rules_programs import Program
from tests.support.rules_strategy import programs


@pytest.mark.slow
def test_accepted_or_a_reason() -> None:
    found: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def check(problem: tuple[Program, Sequence[float]]) -> None:
        params = parameters((5, 7, 3))
        set_gradients(params, 0)
        try:
            groups = generated_groups(captured_rules(optimizer(rule_of(*problem), params)), size=512)
        except Unsupported as e:
            found[e.reason.op] += 1
            return
        for kernel in (k for group in groups for k in group.kernels.launches):
            assert final_ir(kernel.text)
        found["accepted"] += 1

    check()
    assert found.pop("accepted") > 40
    assert found.keys() <= REASONS.keys()
