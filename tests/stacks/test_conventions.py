"""How Megatron and DeepSpeed use an optimizer, as stand-ins: neither package is installed here, one process, no NPU.

Both keep float32 numbers of their own beside the bf16 weights of the model, lay them out in one buffer, give the
optimizer pieces of it instead of the model's parameters, and copy back what it has made of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass

from .twins import MAKERS, Patch, assert_twins, batches, small_model, step_compiled, trained

STACK = ("Megatron, DeepSpeed ZeRO (stand-ins)", ("torch",), "`compile_optimizer_(opt)` of the optimizer that is given")
RAN = (
    "float32 shards as views of one buffer, two ranks one after the other; flat partitions put into `param_groups` "
    "after the call; `torch.amp.GradScaler` with unscaling and clipping"
)

pytestmark = pytest.mark.usefixtures("afresh")


class MegatronShards:
    """What Megatron-core's DistributedOptimizer does on one rank: the float32 masters of its range of the buffer.

    A parameter that crosses the border of two ranks belongs in part to each: a master is a 1-D view of the buffer.
    Its gradients are views of the buffer of gradients.
    """

    def __init__(self, model: torch.nn.Module, rank: int, ranks: int) -> None:
        self.params = list(model.parameters())
        sizes = [p.numel() for p in self.params]
        padded = -(-sum(sizes) // ranks) * ranks
        begin, end = padded // ranks * rank, padded // ranks * (rank + 1)
        self.masters, self.grads = torch.zeros(padded // ranks), torch.zeros(padded // ranks)
        self.pieces: list[tuple[int, slice, torch.nn.Parameter, Tensor]] = []
        start = 0
        for i, (p, size) in enumerate(zip(self.params, sizes, strict=True)):
            low, high = max(start, begin), min(start + size, end)
            if low < high:
                here, there = slice(low - begin, high - begin), slice(low - start, high - start)
                self.masters[here] = p.detach().view(-1)[there].float()
                self.pieces.append((i, there, torch.nn.Parameter(self.masters[here]), self.grads[here]))
            start += size

    def take_gradients(self) -> None:
        for i, there, master, grad in self.pieces:
            grad.copy_(self.params[i].grad.view(-1)[there])  # type: ignore[union-attr]
            master.grad = grad

    @torch.no_grad()
    def copy_back(self) -> None:
        for i, there, master, _ in self.pieces:
            self.params[i].view(-1)[there] = master.bfloat16()


@pytest.mark.parametrize("maker", MAKERS)
def test_a_megatron_style_distributed_optimizer(maker: str) -> None:
    """Two ranks, one after the other; the masters are compared, and what is copied back is what they round to."""

    def run(patch: Patch) -> list[Tensor]:
        model = small_model().bfloat16()
        ranks = [MegatronShards(model, rank, 2) for rank in range(2)]
        opts = [patch(MAKERS[maker]([master for *_, master, _ in rank.pieces])) for rank in ranks]
        for x, y in batches(5):
            model.zero_grad(set_to_none=True)
            torch.nn.functional.mse_loss(model(x.bfloat16()).float(), y).backward()
            for rank in ranks:
                rank.take_gradients()
            norm = torch.stack([rank.grads.square().sum() for rank in ranks]).sum().sqrt()
            for rank, opt in zip(ranks, opts, strict=True):
                rank.grads.mul_(torch.clamp(0.5 / (norm + 1e-6), max=1.0))
                opt.step()
                rank.copy_back()
        flat = torch.cat([rank.masters for rank in ranks])[: sum(p.numel() for p in model.parameters())]
        assert torch.equal(flat.bfloat16(), torch.cat([p.detach().view(-1) for p in model.parameters()]))
        return [master.detach().clone() for rank in ranks for *_, master, _ in rank.pieces]

    assert_twins(run, parameters={1, 4})  # the border of the ranks lies in the first of four parameters


class ZeroPartitions:
    """What DeepSpeed's ZeRO stages 1 and 2 do with a user's optimizer on one rank of one.

    The bf16 weights of a group are views of one flat buffer. The group's only parameter becomes a flat float32
    partition, whose gradient is set before every step and dropped after it.
    """

    def __init__(self, opt: Any, clip: float) -> None:
        self.opt, self.clip = opt, clip
        self.half: list[list[torch.nn.Parameter]] = []
        self.partitions: list[torch.nn.Parameter] = []
        for group in opt.param_groups:
            params = group["params"]
            flat = torch.cat([p.detach().view(-1) for p in params])
            start = 0
            for p in params:
                p.data = flat[start : start + p.numel()].view_as(p)
                start += p.numel()
            self.half.append(params)
            self.partitions.append(torch.nn.Parameter(flat.clone().float()))
            group["params"] = [self.partitions[-1]]

    @torch.no_grad()
    def step(self) -> None:
        for params, partition in zip(self.half, self.partitions, strict=True):
            partition.grad = torch.cat([p.grad.view(-1) for p in params]).float()  # type: ignore[union-attr]
            for p in params:
                p.grad = None
        norm = torch.stack([p.grad.norm() for p in self.partitions]).norm()  # type: ignore[union-attr]
        for partition in self.partitions:
            partition.grad.mul_(1.0 / torch.clamp(norm / self.clip + 1e-6, min=1.0))  # type: ignore[union-attr]
        self.opt.step()
        for params, partition in zip(self.half, self.partitions, strict=True):
            partition.grad = None
            start = 0
            for p in params:
                p.copy_(partition[start : start + p.numel()].view_as(p))
                start += p.numel()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_zero_puts_flat_partitions_in_place_of_the_parameters(maker: str, when: str) -> None:
    """Compiled before it is given to DeepSpeed, or the one that DeepSpeed holds."""

    def run(patch: Patch) -> list[Tensor]:
        model = small_model().bfloat16()
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        opt = MAKERS[maker]([{"params": matrices}, {"params": others, "weight_decay": 0.0}])
        if when == "before":
            patch(opt)
        zero = ZeroPartitions(opt, clip=0.5)
        if when == "after":
            patch(opt)
        for x, y in batches(5):
            torch.nn.functional.mse_loss(model(x.bfloat16()).float(), y).backward()
            zero.step()
        return [p.detach().clone() for p in zero.partitions]

    assert_twins(run)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("patch", [npu_fuse_pass.compile_optimizer_, step_compiled])
def test_grad_scaler_with_unscaling_and_clipping(maker: str, patch: Patch) -> None:
    """A step with an infinite gradient is left out, and the scale gets smaller."""

    def run(patch: Patch) -> list[Tensor]:
        model = small_model()
        opt = patch(MAKERS[maker](model.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for i, (x, y) in enumerate(batches(5)):
            opt.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y) * (float("inf") if i == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 2.0**9
        return trained(model)

    assert_twins(run, patch)
