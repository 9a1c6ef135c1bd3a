"""DeepSpeed's ZeRO on a CPU, two ranks with gloo: it puts flat float32 partitions in place of a group's parameters."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass

from .ranks import RANKS, spawn
from .twins import MAKERS, Patch, assert_twins, batches, small_model

pytestmark = pytest.mark.stack(
    "DeepSpeed",
    ("deepspeed",),
    "`deepspeed.initialize(model=model, optimizer=compile_optimizer_(opt), ...)`",
    "ZeRO stages 1 and 2 on two ranks, bf16 weights, clipping; compiled before and after",
)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero(tmp_path: pathlib.Path, stage: int) -> None:
    spawn(on_a_rank, tmp_path, stage)


def on_a_rank(stage: int) -> None:
    for maker in MAKERS:
        for when in ("before", "after"):

            def run(patch: Patch, maker: str = maker, when: str = when) -> list[Tensor]:
                return train(stage, maker, patch, when)

            assert_twins(run, parameters={1})  # it steps each group as if it were the only one
            assert len(npu_fuse_pass.reports()) == 2, "planned at every step"


def train(stage: int, maker: str, patch: Patch, when: str) -> list[Tensor]:
    """The float32 partitions of this rank, which DeepSpeed has put into the two groups."""
    import deepspeed  # in these processes alone: it changes torch's

    # It would compile a faster all-reduce between processes of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
    }
    model = small_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    opt = MAKERS[maker]([{"params": matrices}, {"params": others, "weight_decay": 0.0}])
    if when == "before":
        patch(opt)
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=opt, config=config, dist_init_required=False)
    assert zero.optimizer is opt
    if when == "after":
        patch(opt)
    for x, y in list(batches(5 * RANKS))[torch.distributed.get_rank() :: RANKS]:
        engine.backward(torch.nn.functional.mse_loss(engine(x.bfloat16()).float(), y))
        engine.step()
    partitions: list[Any] = [p for group in opt.param_groups for p in group["params"]]
    assert len(partitions) == 2 and all(p.dtype == torch.float32 and p.dim() == 1 for p in partitions)
    return [p.detach().clone() for p in partitions]
