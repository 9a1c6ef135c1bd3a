"""Every scheduler of torch.optim: the tests of the fast tier, which runs every sixth, all of them."""

from __future__ import annotations

import pytest

from tests.unit.tools.test_compile_optimizer import (
    SCHEDULERS,
    test_a_compiled_step_in_the_place_of_step_takes_a_scheduler,
    test_every_scheduler_before_and_after,
    test_no_scheduler_of_torch_is_missed,
)

__all__ = [
    "test_a_compiled_step_in_the_place_of_step_takes_a_scheduler",
    "test_every_scheduler_before_and_after",
    "test_no_scheduler_of_torch_is_missed",
]

pytestmark = [
    pytest.mark.usefixtures("afresh"),
    pytest.mark.stack(
        "torch.optim.lr_scheduler",
        ("torch",),
        "`compile_optimizer_(opt)`, before or after the scheduler is made",
        f"all {len(SCHEDULERS)} schedulers",
    ),
]
