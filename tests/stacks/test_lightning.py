"""Lightning: automatic optimization, which steps with a closure, manual optimization, and a checkpoint on the way."""

from __future__ import annotations

import pathlib
from typing import Any

import lightning
import pytest
import torch

import npu_fuse_pass

from .twins import MAKERS, Patch, assert_twins, batches, left_alone, small_model, trained

pytestmark = [
    pytest.mark.usefixtures("afresh"),
    pytest.mark.stack(
        "Lightning",
        ("lightning",),
        "`return compile_optimizer_(opt)` in `configure_optimizers`",
        "automatic (a closure) and manual optimization, a scheduler, bf16-mixed, clipping, resume",
    ),
]


class Small(lightning.LightningModule):
    def __init__(self, maker: str, patch: Patch, manual: bool = False) -> None:
        super().__init__()
        self.inner, self.maker, self.patch = small_model(), maker, patch
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        opt = self.patch(MAKERS[self.maker](self.parameters()))
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)]

    def training_step(self, batch: Any, _: int) -> Any:
        loss = torch.nn.functional.mse_loss(self.inner(batch[0]), batch[1])
        if not self.automatic_optimization:
            opt: Any = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        return loss


def trainer(folder: pathlib.Path, epochs: int, **given: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **given,
    )


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("how", ["automatic", "manual", "bf16-mixed", "clipped"])
def test_training(tmp_path: pathlib.Path, maker: str, how: str) -> None:
    given = {"bf16-mixed": {"precision": "bf16-mixed"}, "clipped": {"gradient_clip_val": 0.1}}.get(how, {})

    def run(patch: Patch) -> list[torch.Tensor]:
        module = Small(maker, patch, manual=how == "manual")
        trainer(tmp_path, 2, **given).fit(module, batches(2))
        return trained(module)

    assert_twins(run)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("before", ["eager", "compiled"])
def test_resume(tmp_path: pathlib.Path, maker: str, before: str) -> None:
    """An epoch, a checkpoint, another epoch in another trainer: as two of an eager one."""

    def run(patch: Patch) -> list[torch.Tensor]:
        if patch is not npu_fuse_pass.compile_optimizer_:
            module = Small(maker, patch)
            trainer(tmp_path, 2).fit(module, batches(2))
            return trained(module)
        first = trainer(tmp_path, 1)
        first.fit(Small(maker, patch if before == "compiled" else left_alone), batches(2))
        first.save_checkpoint(tmp_path / "saved.ckpt")
        npu_fuse_pass.clear_reports()
        module = Small(maker, patch)
        trainer(tmp_path, 2).fit(module, batches(2), ckpt_path=tmp_path / "saved.ckpt")
        return trained(module)

    assert_twins(run)
