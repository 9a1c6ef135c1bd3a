"""transformers' Trainer: its own optimizer and a given one, warmup from lr 0, bf16, a checkpoint on the way."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import npu_fuse_pass

from .models import language_model, sentences
from .twins import MAKERS, Patch, assert_as_near, left_alone, trained

pytestmark = [
    pytest.mark.usefixtures("afresh"),
    pytest.mark.stack(
        "HF Trainer",
        ("transformers", "accelerate"),
        "`Trainer(..., optimizers=(compile_optimizer_(opt), None))`, or override `create_optimizer`: "
        "`return compile_optimizer_(super().create_optimizer(*args, **kwargs))`",
        "its own AdamW (fused=True) and given ones, warmup from lr 0, bf16, gradient accumulation, resume",
    ),
]


def arguments(folder: pathlib.Path, **given: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,  # the size below which differences count absolutely: a larger step may end at 0
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,  # lr is 0 at the first step
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **given,
    }
    return TrainingArguments(output_dir=str(folder), **chosen)


class OwnOptimizer(Trainer):
    """As a user writes it whose optimizer Trainer makes."""

    patch: Patch

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        return self.patch(super().create_optimizer(*args, **kwargs))


def own(
    folder: pathlib.Path, patch: Patch, dtype: torch.dtype, resume: bool = False, **given: Any
) -> list[torch.Tensor]:
    trainer = OwnOptimizer(language_model(dtype), arguments(folder, **given), train_dataset=sentences())
    trainer.patch = patch
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 4
    return trained(trainer.model)


@pytest.mark.parametrize("given", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_its_own_optimizer(tmp_path: pathlib.Path, given: dict[str, Any]) -> None:
    """AdamW with fused=True, which is switched off with a word; a linear warmup from lr 0."""
    assert_as_near(lambda patch, dtype: own(tmp_path, patch, dtype, **given))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_given_optimizer(tmp_path: pathlib.Path, maker: str) -> None:
    def run(patch: Patch, dtype: torch.dtype) -> list[torch.Tensor]:
        model = language_model(dtype)
        opt = patch(MAKERS[maker](model.parameters()))
        Trainer(model, arguments(tmp_path), train_dataset=sentences(), optimizers=(opt, None)).train()
        return trained(model)

    assert_as_near(run)


@pytest.mark.parametrize("before", ["eager", "compiled"])
def test_resume(tmp_path: pathlib.Path, before: str) -> None:
    """Two steps, a checkpoint, two more in another trainer: as four steps of an eager one without a break."""

    def run(patch: Patch, dtype: torch.dtype) -> list[torch.Tensor]:
        if patch is left_alone:
            return own(tmp_path / "whole", patch, dtype)
        saving = {"save_strategy": "steps", "save_steps": 2}
        own(tmp_path / "broken", patch if before == "compiled" else left_alone, dtype, **saving)
        for kept in (tmp_path / "broken").glob("checkpoint-4*"):
            kept.rename(tmp_path / "last")
        npu_fuse_pass.clear_reports()
        return own(tmp_path / "broken", patch, dtype, resume=True, **saving)

    assert_as_near(run)
