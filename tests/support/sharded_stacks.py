"""What stands around a step of sharded parameters: checkpoints of other numbers of processes, clipping, rounding."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.reasons import Code
from tests.support import sharded_ranks
from tests.support.sharded_ranks import compare, model, shard_fully, train, whole
from tests.support.training import FULL


def save(m: torch.nn.Module, opt: Any, name: str) -> None:
    state = {"o": get_optimizer_state_dict(m, opt), "m": m.state_dict()}
    dcp.save(state, checkpoint_id=f"{os.environ['SHARDED_FOLDER']}-{name}")


def load(m: torch.nn.Module, opt: Any, name: str) -> None:
    read = {"o": get_optimizer_state_dict(m, opt), "m": m.state_dict()}
    dcp.load(read, checkpoint_id=f"{os.environ['SHARDED_FOLDER']}-{name}")
    set_optimizer_state_dict(m, opt, read["o"])
    m.load_state_dict(read["m"])


def alone(steps: int) -> tuple[torch.nn.Module, Any]:
    """A run of one process."""
    m = model()
    opt = optimizers.NpuFusedAdamW(m.parameters(), lr=0.1)
    train(m, opt, opt.step, range(steps))
    return m, opt


def save_alone() -> None:
    """Before the processes begin: what one process saves."""
    save(*alone(3), "one")


def checkpoint_of_one_process(mesh: Any) -> None:
    """What one process has saved goes on in all of them, and what they save then is there for one."""
    m = model()
    shard_fully(m, mesh)
    opt = optimizers.NpuFusedAdamW(m.parameters(), lr=0.1)
    train(m, opt, opt.step, range(7, 8))
    load(m, opt, "one")
    plain, other = alone(3)
    for p, q in zip(m.parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(p), q), "a parameter"
        for name, t in other.state[q].items():
            assert torch.equal(whole(opt.state[p][name]), t), name
    npu_fuse_pass.clear_reports()
    train(m, opt, torch.compile(opt.step, backend="npu_fused"), range(3, 5))
    train(plain, other, other.step, range(3, 5))
    compare(m, opt, plain, other, "after a checkpoint of one process")
    sharded_ranks.check_report("AdamW")
    save(m, opt, "several")


def load_alone() -> None:
    """When the processes have ended: what they have saved goes on in one."""
    m, opt = alone(1)
    load(m, opt, "several")
    plain, other = alone(5)
    npu_fuse_pass.clear_reports()
    train(m, opt, torch.compile(opt.step, backend="npu_fused"), range(5, 7))
    train(plain, other, other.step, range(5, 7))
    for p, q in zip(m.parameters(), plain.parameters(), strict=True):
        assert not isinstance(opt.state[p]["exp_avg"], DTensor)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(opt.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"], rtol=1e-4, atol=1e-8)
        assert int(opt.state[p]["step"]) == 7
    sharded_ranks.check_report("AdamW")


def clipping(mesh: Any) -> None:
    """torch's clip_grad_norm_ before our step, outside and inside of a compiled function: the norm is of the whole."""
    placed = [[Shard(0)], [Shard(1)], [Replicate()]]
    for name in ("AdamW", "LAMB") if FULL else ("LAMB",):
        for inside in (False, True) if FULL else (False,):
            torch._dynamo.reset()
            npu_fuse_pass.clear_reports()
            generator = torch.Generator().manual_seed(0)
            plain = [torch.nn.Parameter(torch.randn(5, 4, generator=generator)) for _ in placed]
            pairs = zip(plain, placed, strict=True)
            spread = [torch.nn.Parameter(distribute_tensor(q.detach().clone(), mesh, p)) for q, p in pairs]
            make = sharded_ranks.OPTIMIZERS[name]
            ours, other = make(spread), make(plain)
            step = ours.step if inside else npu_fuse_pass.compile_step(ours)

            def clipped(step: Any = step, spread: Any = spread) -> Any:
                norm = torch.nn.utils.clip_grad_norm_(spread, 1.5)
                step()
                return norm

            call = torch.compile(clipped, backend="npu_fused") if inside else clipped
            for seed in range(3):
                for p, q in zip(spread, plain, strict=True):
                    q.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed + q.numel()))
                    p.grad = distribute_tensor(q.grad.clone(), mesh, p.placements)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    norm = call()
                want = torch.nn.utils.clip_grad_norm_(plain, 1.5)
                other.step()
                assert torch.allclose(whole(norm), want, rtol=1e-6), f"{whole(norm)} instead of {want}"
            for p, q in zip(spread, plain, strict=True):
                assert torch.allclose(whole(p.grad), q.grad, rtol=1e-6), "a gradient"
                assert torch.allclose(whole(p), q, rtol=1e-5, atol=1e-7), f"a parameter of {name}, inside {inside}"
            reports = npu_fuse_pass.reports()
            told = "\n".join(map(str, reports))
            fused = [r for r in reports if r.fallback is None and sum(g.updates for g in r.groups) == len(plain)]
            assert len(fused) == 1, f"{name}, inside {inside}: {told}"
            rest = [r for r in reports if r not in fused]
            assert bool(rest) is inside and all(r.fallbacks[0].code is Code.SHARDED for r in rest), told


def stochastic_rounding(mesh: Any) -> None:
    """Shards of the first dimension are rounded as one process would; other shards by chance; replicas alike."""
    for name in ("AdamW", "LAMB"):
        for compiled in (True, False) if FULL else (name == "AdamW",):
            torch._dynamo.reset()
            npu_fuse_pass.clear_reports()
            placed = [[Shard(0)], [Replicate()], [Shard(1)]]
            values = [torch.randn(7, 40, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
            plain = [torch.nn.Parameter(v.clone()) for v in values]
            pairs = zip(values, placed, strict=True)
            spread = [torch.nn.Parameter(distribute_tensor(v, mesh, p)) for v, p in pairs]
            make: Any = optimizers.NpuFusedAdamW if name == "AdamW" else optimizers.NpuFusedLamb
            options: Any = {"lr": 1e-3, "state_dtype": torch.float32, "stochastic_rounding": True}
            ours, other = make(spread, **options), make(plain, **options)
            step = npu_fuse_pass.compile_step(ours) if compiled else ours.step
            for seed in range(4):
                for p, q in zip(spread, plain, strict=True):
                    q.grad = torch.randn(7, 40, generator=torch.Generator().manual_seed(seed)).bfloat16()
                    p.grad = distribute_tensor(q.grad.clone(), mesh, p.placements)
                step()
                other.step()
            for i, (p, q) in enumerate(zip(spread, plain, strict=True)):
                got = whole(p)
                differ = int((got != q).sum())
                assert i == 2 or differ <= (0 if name == "AdamW" else 3), f"{name}, {placed[i]}: {differ} differ"
                assert torch.allclose(got.float(), q.float(), rtol=0.04), f"{name}, {placed[i]}"
            held = [torch.empty_like(values[1]) for _ in range(mesh.size())]
            dist.all_gather(held, spread[1].to_local().detach().contiguous())
            assert all(torch.equal(h, held[0]) for h in held), "replicas differ"
            if compiled:
                sharded_ranks.check_report(name)


OWN = (checkpoint_of_one_process, clipping, stochastic_rounding)


def run(rank: int, world: int, store: str) -> None:
    """All scenarios, those of sharded_ranks.py first."""
    sharded_ranks.run(rank, world, store, (*sharded_ranks.SCENARIOS, *OWN))
