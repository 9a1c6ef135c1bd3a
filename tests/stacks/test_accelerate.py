"""accelerate: prepared, with a GradScaler and without, bf16, a saved state; an optimizer that is compiled too late."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import npu_fuse_pass
from tests.support.training import assert_close

from .twins import MAKERS, RELATIVE, Patch, assert_all_fused, assert_twins, batches, left_alone, small_model, trained

pytestmark = [
    pytest.mark.usefixtures("afresh"),
    pytest.mark.stack(
        "accelerate",
        ("accelerate",),
        "`compile_optimizer_(opt)` before `accelerator.prepare(...)`",
        "plain, bf16, gradient accumulation, clipping, a scheduler, a GradScaler (compiled before and after), resume",
    ),
]


def prepared(maker: str, patch: Patch, when: str = "before", **given: Any) -> tuple[Any, ...]:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, **given)
    model = small_model()
    opt = MAKERS[maker](model.parameters())
    if when == "before":
        patch(opt)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.9)
    made = accelerator.prepare(model, opt, batches(4), scheduler)
    if when == "after":
        patch(made[1])
    return accelerator, *made


def train(accelerator: Any, model: Any, opt: Any, loader: Any, scheduler: Any) -> list[torch.Tensor]:
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return trained(model)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("given", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_prepared(maker: str, when: str, given: dict[str, Any]) -> None:
    assert_twins(lambda patch: train(*prepared(maker, patch, when, **given)))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_saved_state_goes_on(tmp_path: pathlib.Path, maker: str) -> None:
    """Four steps, a saved state, four more of a new process's objects: as eight eager ones."""

    def run(patch: Patch) -> list[torch.Tensor]:
        first = prepared(maker, patch)
        train(*first)
        if patch is left_alone:
            return train(*first)
        first[0].save_state(str(tmp_path))
        npu_fuse_pass.clear_reports()
        second = prepared(maker, patch)
        second[0].load_state(str(tmp_path))
        return train(*second)

    assert_twins(run)


def scaled(maker: str, patch: Patch, when: str) -> tuple[list[torch.Tensor], list[str]]:
    """Steps of an optimizer that accelerate wraps with a GradScaler, and what was said."""
    AcceleratorState._reset_state(True)
    Accelerator(cpu=True)
    model = small_model()
    opt = MAKERS[maker](model.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if when == "before":
            patch(opt)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        wrapped = AcceleratedOptimizer(opt, scaler=scaler)
        if when == "after":
            patch(opt)
        for i, (x, y) in enumerate(batches(5)):
            wrapped.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y) * (float("inf") if i == 1 else 1.0)  # one is left out
            scaler.scale(loss).backward()
            wrapped.step()
    return trained(model), [text for w in said if "npu_fuse" in (text := str(w.message))]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_grad_scaler_that_is_made_afterwards(maker: str) -> None:
    assert_twins(lambda patch: scaled(maker, patch, "before")[0])


@pytest.mark.parametrize("maker", MAKERS)
def test_a_grad_scaler_that_was_made_before(maker: str) -> None:
    """accelerate has kept the eager step: one warning says that nothing was compiled; or all is fused."""
    want, _ = scaled(maker, left_alone, "after")
    npu_fuse_pass.clear_reports()
    got, said = scaled(maker, npu_fuse_pass.compile_optimizer_, "after")
    assert_close(got, want, RELATIVE)
    if npu_fuse_pass.reports():
        assert_all_fused({len(want)})
    else:
        assert len(said) == 1, said
