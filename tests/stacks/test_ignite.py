"""ignite: a supervised trainer with a schedule of ignite's own, and with a GradScaler."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import PiecewiseLinear

import npu_fuse_pass

from .twins import MAKERS, Patch, assert_twins, batches, small_model, step_compiled, trained

pytestmark = [
    pytest.mark.usefixtures("afresh"),
    pytest.mark.stack(
        "ignite",
        ("pytorch-ignite",),
        "`create_supervised_trainer(model, compile_optimizer_(opt), loss)`",
        "supervised trainer, PiecewiseLinear from lr 0",
    ),
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("patch", [npu_fuse_pass.compile_optimizer_, step_compiled])
def test_a_supervised_trainer(maker: str, patch: Patch) -> None:
    def run(patch: Patch) -> list[torch.Tensor]:
        model = small_model()
        opt = patch(MAKERS[maker](model.parameters()))
        engine = create_supervised_trainer(model, opt, torch.nn.functional.mse_loss)
        schedule = PiecewiseLinear(opt, "lr", milestones_values=[(0, 0.0), (3, 1e-2), (6, 1e-3)])
        engine.add_event_handler(Events.ITERATION_STARTED, schedule)
        engine.run(batches(3), max_epochs=2)
        return trained(model)

    assert_twins(run, patch)
