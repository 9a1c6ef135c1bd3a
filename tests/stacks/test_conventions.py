"""How Megatron's distributed optimizer uses an optimizer, as a stand-in, and torch's GradScaler."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import npu_fuse_pass

from .ranks import RANKS, spawn
from .twins import MAKERS, Patch, assert_twins, batches, small_model, step_compiled, trained

pytestmark = pytest.mark.usefixtures("afresh")


class MegatronShards:
    """What Megatron-core's DistributedOptimizer does on one rank.

    The bf16 weights of the model are views of one buffer, and so are float32 gradients. Each rank holds the float32
    masters of its range: 1-D views of one buffer, so that a parameter which crosses a border belongs in part to each.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        size = -(-sum(p.numel() for p in model.parameters()) // RANKS)
        begin = size * dist.get_rank()
        self.weights, self.grads = torch.zeros(size * RANKS, dtype=torch.bfloat16), torch.zeros(size * RANKS)
        self.own_weights = self.weights[begin : begin + size]
        self.masters, self.own_grads = torch.zeros(size), torch.zeros(size)
        self.params: list[tuple[torch.nn.Parameter, slice]] = []
        self.pieces: list[tuple[torch.nn.Parameter, Tensor]] = []
        start = 0
        for p in model.parameters():
            there = slice(start, start + p.numel())
            self.weights[there] = p.detach().view(-1)
            p.data = self.weights[there].view_as(p)
            self.params.append((p, there))
            here = slice(max(there.start - begin, 0), min(there.stop - begin, size))
            if here.start < here.stop:
                self.pieces.append((torch.nn.Parameter(self.masters[here]), self.own_grads[here]))
            start = there.stop
        self.masters.copy_(self.own_weights)

    def reduce_gradients(self, clip: float) -> None:
        for p, there in self.params:
            self.grads[there] = p.grad.view(-1)  # type: ignore[union-attr]
            p.grad = None
        dist.reduce_scatter_tensor(self.own_grads, self.grads)
        self.own_grads.div_(RANKS)
        norm = self.own_grads.square().sum()
        dist.all_reduce(norm)
        self.own_grads.mul_(torch.clamp(clip / (norm.sqrt() + 1e-6), max=1.0))
        for master, grad in self.pieces:
            master.grad = grad

    def copy_back(self) -> None:
        self.own_weights.copy_(self.masters)
        dist.all_gather_into_tensor(self.weights, self.own_weights.clone())


def on_a_rank(maker: str) -> None:
    """The masters are compared; what is copied back is what those of all ranks round to."""

    def run(patch: Patch) -> list[Tensor]:
        model = small_model().bfloat16()
        shards = MegatronShards(model)
        opt = patch(MAKERS[maker]([master for master, _ in shards.pieces]))
        for x, y in list(batches(5 * RANKS))[dist.get_rank() :: RANKS]:
            torch.nn.functional.mse_loss(model(x.bfloat16()).float(), y).backward()
            shards.reduce_gradients(clip=0.5)
            opt.step()
            shards.copy_back()
        every = torch.empty(RANKS * shards.masters.numel())
        dist.all_gather_into_tensor(every, shards.masters)
        assert all(torch.equal(p.view(-1), every[there].bfloat16()) for p, there in shards.params)
        return [master.detach().clone() for master, _ in shards.pieces]

    assert_twins(run, parameters={[1, 4][dist.get_rank()]})  # the border lies in the first of four parameters


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.stack(
    "Megatron-style distributed optimizer (a stand-in)",
    ("torch",),
    "`compile_optimizer_(opt)` of the optimizer of the float32 shards",
    "float32 shards as views of one buffer, gradients and bf16 weights reduced and gathered by gloo, two ranks",
)
def test_a_megatron_style_distributed_optimizer(tmp_path: pathlib.Path, maker: str) -> None:
    spawn(on_a_rank, tmp_path, maker)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("patch", [npu_fuse_pass.compile_optimizer_, step_compiled])
@pytest.mark.stack(
    "torch.amp.GradScaler", ("torch",), "`compile_optimizer_(opt)`", "unscaling, clipping, a step left out"
)
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
