"""What test_sharded.py runs on every rank: each function raises where something is wrong."""

from __future__ import annotations

import copy
import datetime
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import npu_fuse_pass
import optimizers
from npu_fuse_pass import pipeline
from npu_fuse_pass.lowerings.cpu import build, compiler
from npu_fuse_pass.reasons import Code
from optimizers.paddle import RMSProp
from tests.support.training import FULL

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda ps: optimizers.NpuFusedSGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: optimizers.NpuFusedAdamW(ps, lr=0.1),
    "RMSpropTF": lambda ps: optimizers.NpuFusedRMSpropTF(ps, lr=0.1),
    "lion": lambda ps: optimizers.lion(ps, lr=0.1),
    "paddle": lambda ps: RMSProp(0.1, parameters=list(ps)),
    "LAMB": lambda ps: optimizers.NpuFusedLamb(ps, lr=0.1),
    "LAMB, global norm": lambda ps: optimizers.NpuFusedLamb(ps, lr=0.1, use_global_grad_norm=True),
}


def model(hidden: int = 5) -> torch.nn.Module:
    """With 5 hidden units the shards are uneven, and with 4 ranks some are empty."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3, bias=False))


def train(m: torch.nn.Module, opt: Any, step: Callable[[], Any], seeds: range) -> None:
    for seed in seeds:
        opt.zero_grad()
        m(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        step()


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()


def compare(sharded: Any, ours: Any, plain: Any, other: Any, what: str) -> None:
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        pairs = [("param", p, q), *((n, ours.state[p][n], other.state[q][n]) for n in other.state.get(q, {}))]
        for name, a, b in pairs:
            assert isinstance(a, DTensor) is (name != "step"), f"{what}: {name} is a {type(a).__name__}"
            far = (whole(a).double() - b.detach().double()).norm() / b.detach().double().norm()
            assert far < 1e-5, f"{what}: {name} differs by {far:.2g}"


def check_report(name: str) -> None:
    report = npu_fuse_pass.reports()[-1]
    assert report.fallback is None and report.groups, f"{name}: {report}"


def shard_fully(m: torch.nn.Module, mesh: Any) -> None:
    fully_shard(m[0], mesh=mesh)  # type: ignore[index]
    fully_shard(m, mesh=mesh)


def shard_tensors(m: torch.nn.Module, mesh: Any) -> None:
    parallelize_module(m, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def patched(opt: Any) -> Callable[[], Any]:
    """As a user writes it; the class that is not torch's is given to compile_step."""
    if isinstance(opt, RMSProp):
        return npu_fuse_pass.compile_step(opt)
    return npu_fuse_pass.compile_optimizer_(opt).step  # type: ignore[no-any-return]


def trajectories(mesh: Any, parallel: Callable[[Any, Any], None], hidden: int, names: Any = tuple(OPTIMIZERS)) -> None:
    """As one process, compiled and eager."""
    for name in names:
        make = OPTIMIZERS[name]
        for compiled in (True, False):
            torch._dynamo.reset()
            npu_fuse_pass.clear_reports()
            sharded, plain = model(hidden), model(hidden)
            parallel(sharded, mesh)
            ours, other = make(sharded.parameters()), make(plain.parameters())
            step = patched(ours) if compiled else ours.step
            versions = [p._version for p in sharded.parameters()]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(sharded, ours, step, range(4))
            train(plain, other, other.step, range(4))
            compare(sharded, ours, plain, other, f"{name}, compiled {compiled}")
            assert all(p._version > v for p, v in zip(sharded.parameters(), versions, strict=True)), name
            if compiled:
                check_report(name)


def fully(mesh: Any) -> None:
    trajectories(mesh, shard_fully, hidden=5)


def tensor_parallel(mesh: Any) -> None:
    trajectories(mesh, shard_tensors, hidden=8)


def checkpoints(mesh: Any) -> None:
    """Saved by all ranks with torch.distributed.checkpoint, loaded into sharded parameters and into whole ones."""
    folder = os.environ["SHARDED_FOLDER"]
    m = model()
    shard_fully(m, mesh)
    opt = optimizers.NpuFusedAdamW(m.parameters(), lr=0.1)
    train(m, opt, opt.step, range(3))
    dcp.save({"o": get_optimizer_state_dict(m, opt), "m": m.state_dict()}, checkpoint_id=folder)
    n = model()
    shard_fully(n, mesh)
    again = optimizers.NpuFusedAdamW(n.parameters(), lr=0.1)
    train(n, again, again.step, range(7, 8))
    read = {"o": get_optimizer_state_dict(n, again), "m": n.state_dict()}
    dcp.load(read, checkpoint_id=folder)
    set_optimizer_state_dict(n, again, read["o"])
    n.load_state_dict(read["m"])
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(opt.state[p][name]), whole(again.state[q][name])), name
    train(m, opt, opt.step, range(3, 5))
    train(n, again, torch.compile(again.step, backend="npu_fused"), range(3, 5))
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert torch.allclose(whole(p), whole(q), rtol=1e-6)
    plain = copy.deepcopy(opt.state_dict())
    other = model()
    with_whole = optimizers.NpuFusedAdamW(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is a DTensor"):
        with_whole.load_state_dict(plain)


def gradients_that_lie_otherwise(mesh: Any) -> None:
    """A gradient is brought to where its parameter lies; a plain one is refused before anything is changed."""
    p = torch.nn.Parameter(distribute_tensor(torch.arange(20.0).reshape(5, 4), mesh, [Shard(0)]))
    q = torch.nn.Parameter(torch.arange(20.0).reshape(5, 4))
    ours, other = optimizers.NpuFusedAdamW([p], lr=0.1), optimizers.NpuFusedAdamW([q], lr=0.1)
    grad = torch.linspace(-1, 1, 20).reshape(5, 4)
    for placements in ([Shard(1)], [Replicate()], [Shard(0)]):
        p.grad, q.grad = distribute_tensor(grad, mesh, placements), grad.clone()
        ours.step()
        other.step()
    assert torch.allclose(whole(p), q)


def within_a_function(mesh: Any) -> None:
    """A training function that is compiled as a whole: the step gets a graph of its own, fused."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    p = torch.nn.Parameter(distribute_tensor(torch.arange(20.0).reshape(5, 4), mesh, [Shard(0)]))
    q = torch.nn.Parameter(torch.arange(20.0).reshape(5, 4))
    ours, other = optimizers.NpuFusedAdamW([p], lr=0.1), optimizers.NpuFusedAdamW([q], lr=0.1)
    p.grad, q.grad = distribute_tensor(torch.ones(5, 4), mesh, [Shard(0)]), torch.ones(5, 4)

    @torch.compile(backend="npu_fused")
    def function() -> None:
        ours.step()

    for _ in range(3):
        function()
        other.step()
    assert torch.allclose(whole(p), q)
    check_report("AdamW")


STOCK: dict[str, dict[str, Any]] = {
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "Adam": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "ASGD": {},
}


def stock_pair(name: str, mesh: Any) -> tuple[list[Any], Any, list[Any], Any]:
    """torch's class over DTensors (one of them with an empty shard, one replicated) and a plain tensor; without."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((5, 4), (1, 2), (3,), (3,))]
    placed = [[Shard(0)], [Shard(0)], [Replicate()]]
    plain = [torch.nn.Parameter(v.clone()) for v in values]
    spread = [torch.nn.Parameter(distribute_tensor(v, mesh, p)) for v, p in zip(values, placed, strict=False)]
    params = [*spread, torch.nn.Parameter(values[-1].clone())]
    make = getattr(torch.optim, name)
    return params, make(params, lr=0.1, **STOCK[name]), plain, make(plain, lr=0.1, **STOCK[name])


def stock_step(params: list[Any], step: Callable[[], Any], plain: list[Any], other: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(params, plain, strict=True):
        q.grad = torch.randn(q.shape, generator=generator)
        p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else q.grad.clone()
    step()
    other.step()


def compare_stock(params: list[Any], opt: Any, plain: list[Any], other: Any, name: str) -> None:
    for p, q in zip(params, plain, strict=True):
        assert opt.state[p].keys() == other.state[q].keys(), name
        for what, a, b in [("param", p, q), *((n, opt.state[p][n], other.state[q][n]) for n in other.state[q])]:
            if isinstance(p, DTensor) and what not in ("step", "mu_product", "eta", "mu"):
                assert isinstance(a, DTensor) and a.placements == p.placements, (
                    f"{name}: {what} is a {type(a).__name__}"
                )
            far = (whole(a).double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-30)
            assert far < 1e-6, f"{name}: {what} differs by {far:.2g}"


def stock_classes(mesh: Any) -> None:
    """torch's classes as rules, on local parts; states are DTensors as torch's, and what is put there counts."""
    for name in STOCK if FULL else ("AdamW", "SGD"):
        npu_fuse_pass.clear_reports()
        params, opt, plain, other = stock_pair(name, mesh)
        step = npu_fuse_pass.compile_step(opt, strict=True)
        versions = [p._version for p in params]
        for seed in range(3):
            stock_step(params, step, plain, other, seed)
        report = npu_fuse_pass.reports()[-1]
        assert report.replaces == f"torch.optim.{name}", str(report)
        assert report.fallback is None and sum(g.updates for g in report.groups) == 4, str(report)
        compare_stock(params, opt, plain, other, name)
        assert all(p._version > v for p, v in zip(params, versions, strict=True)), name
        for optimizer in (opt, other):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        stock_step(params, step, plain, other, 3)
        if name != "Rprop":  # which torch itself does not run on DTensors
            opt.step(), other.step()
        stock_step(params, step, plain, other, 4)
        compare_stock(params, opt, plain, other, f"{name}, loaded")


def stock_gradients_that_lie_otherwise(mesh: Any) -> None:
    """A gradient that is distributed in another way than its parameter: torch's own step, and the report says why."""
    npu_fuse_pass.clear_reports()
    p = torch.nn.Parameter(distribute_tensor(torch.arange(20.0).reshape(5, 4), mesh, [Shard(0)]))
    q = torch.nn.Parameter(torch.arange(20.0).reshape(5, 4))
    opt, other = torch.optim.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    q.grad = torch.linspace(-1, 1, 20).reshape(5, 4)
    p.grad = distribute_tensor(q.grad, mesh, [Replicate()])
    with pytest.warns(UserWarning, match=r"What to do: give gradients the layout .*redistribute"):
        npu_fuse_pass.compile_step(opt)()
    other.step()
    assert torch.allclose(whole(p), q), (whole(p) - q).abs().max()
    report = npu_fuse_pass.reports()[-1]
    assert "distributed in another way" in str(report.no_rule) and report.fallback is not None, str(report)


def dynamo_road(mesh: Any) -> None:
    """torch.compile of a step of torch's and of a function on a DTensor: on local parts, but no norms."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params, opt, plain, other = stock_pair("AdamW", mesh)
    step = torch.compile(opt.step, backend="npu_fused")
    versions = [p._version for p in params]
    for seed in range(3):
        stock_step(params, step, plain, other, seed)
    compare_stock(params, opt, plain, other, "captured")
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    reports = npu_fuse_pass.reports()
    assert reports and all(r.fallback is None and r.groups for r in reports), [*map(str, reports)]
    p = params[0]

    @torch.compile(backend="npu_fused")
    @torch.no_grad()
    def function(divided: bool) -> None:
        p.div_(p.norm()) if divided else p.mul_(0.5)

    for divided in (False, True):
        npu_fuse_pass.clear_reports()
        want = whole(p).detach() / whole(p).detach().norm() if divided else whole(p).detach() * 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(divided)
        assert torch.allclose(whole(p), want, rtol=1e-6)
        report = npu_fuse_pass.reports()[-1]
        assert [reason.code for reason in report.fallbacks] == [Code.SHARDED] * divided, str(report)


@npu_fuse_pass.rule(states={"m": npu_fuse_pass.zeros}, defaults={"lr": 0.1})
def extremes(param: Any, grad: Any, m: Any, *, lr: Any) -> Any:
    """A mean, an extreme, and a norm that depends on both; `numel` is that of the whole parameter."""
    m = 0.9 * m + grad / (grad.abs().amax() + 1.0) + 0.1 * grad.mean()
    return param - lr * m / (m.norm() + grad.amin().abs() + param.numel()), m


SPREAD: dict[str, Callable[[Any], Any]] = {
    "LAMB": OPTIMIZERS["LAMB"],
    "LAMB, global norm": OPTIMIZERS["LAMB, global norm"],
    "extremes": lambda ps: extremes(ps),
}
DEPENDENT = {"LAMB": 1, "LAMB, global norm": 2, "extremes": 2}  # passes that wait for all processes


class Pair:
    """The same steps of an optimizer over tensors that are spread over processes and of one over whole ones."""

    def __init__(self, name: str, mesh: Any, placements: Any, compiled: bool = True) -> None:
        npu_fuse_pass.clear_reports()
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(5, 3, generator=generator) for _ in placements]
        self.plain = [torch.nn.Parameter(v.clone()) for v in values]
        spread = [torch.nn.Parameter(distribute_tensor(v, mesh, p)) for v, p in zip(values, placements, strict=True)]
        self.spread: list[Any] = [*spread, torch.nn.Parameter(values[0].clone())]
        self.plain.append(torch.nn.Parameter(values[0].clone()))
        self.opt, self.other = SPREAD[name](self.spread), SPREAD[name](self.plain)
        self.call = npu_fuse_pass.compile_step(self.opt) if compiled else self.opt.step
        self.name, self.mesh = name, mesh

    def gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(self.spread, self.plain, strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = q.grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(q.grad, self.mesh, p.placements)

    def step(self) -> int:
        """Both; how many collectives the one over spread tensors has needed."""
        counted, real = [], {n: getattr(dist, n) for n in ("all_reduce", "all_gather")}
        for n, function in real.items():
            setattr(dist, n, lambda *a, function=function, **k: (counted.append(1), function(*a, **k))[1])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.call()
        finally:
            for n, function in real.items():
                setattr(dist, n, function)
        self.other.step()
        return len(counted)

    def compare(self, what: str) -> None:
        for p, q in zip(self.spread, self.plain, strict=True):
            for n, a, b in [("param", p, q), *((n, self.opt.state[p][n], s) for n, s in self.other.state[q].items())]:
                far = (whole(a).double() - b.detach().double()).norm() / b.detach().double().norm()
                assert far < 1e-6, f"{self.name}, {what}: {n} differs by {far:.2g}"

    @property
    def fused(self) -> bool:
        report = npu_fuse_pass.reports()[-1]
        return report.fallback is None and bool(report.groups)


def placed(mesh: Any) -> list[Any]:
    """All ways in which two dimensions can be laid out on a mesh of one or two."""
    if mesh.ndim == 1:
        return [[Shard(0)], [Shard(1)], [Replicate()], [Shard(0)]]
    pairs = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(0))]
    return [*map(list, pairs), [Replicate(), Replicate()]]


def norms(mesh: Any) -> None:
    """Fused, on meshes of one and two dimensions; a collective for each dependent pass and dimension of the mesh."""
    world = mesh.size()
    for shape in [(world,), (2, world // 2)]:
        over = mesh if len(shape) == 1 else init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        for name in SPREAD if FULL else ("LAMB, global norm",) if len(shape) == 1 else ("extremes",):
            pair = Pair(name, over, placed(over))
            for seed in range(4):
                pair.gradients(seed)
                collectives = pair.step()
                first = (seed == 0) * len(shape)  # to agree on the road
                assert collectives == DEPENDENT[name] * len(shape) + first, f"{name}, {shape}: {collectives}"
            assert pair.fused, str(npu_fuse_pass.reports()[-1])
            pair.compare(f"mesh {shape}")


def fully_and_tensor_parallel(mesh: Any) -> None:
    """FSDP2 over tensor parallel: both shard the same dimension of a tensor."""
    over = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("data", "tensor"))

    def parallel(m: torch.nn.Module, _: Any) -> None:
        shard_tensors(m, over["tensor"])
        shard_fully(m, over["data"])

    trajectories(over, parallel, hidden=8, names=("LAMB, global norm",))


def missing_gradients(mesh: Any) -> None:
    """A process without gradients takes part as one that holds zeros of them, compiled or not."""
    for compiled in (True, False) if FULL else (True,):
        pair = Pair("LAMB, global norm", mesh, placed(mesh), compiled)
        for seed, missing in enumerate(([], [0], [0], [0, 1, 3], [], [])):
            pair.gradients(seed)
            for i in missing:  # the last process lacks them
                if mesh.get_rank() == mesh.size() - 1:
                    pair.spread[i].grad._local_tensor.zero_()
                pair.plain[i].grad = whole(pair.spread[i].grad)
                if mesh.get_rank() == mesh.size() - 1:
                    pair.spread[i].grad = None
            if seed == 4:  # and all of one, which is then left out
                pair.spread[1].grad = pair.plain[1].grad = None
            pair.step()
        assert not compiled or pair.fused, str(npu_fuse_pass.reports()[-1])
        pair.compare(f"missing gradients, compiled {compiled}")


def no_compiler() -> None:
    os.environ["CXX"] = "false"  # ends with an error, whatever it is asked for
    os.environ["NPU_FUSE_CACHE_DIR"] = os.environ["SHARDED_FOLDER"] + "-none"
    os.makedirs(os.environ["NPU_FUSE_CACHE_DIR"], mode=0o700, exist_ok=True)
    build._loaded.clear()
    ask_again()


def ask_again() -> None:
    for known in (compiler.compiler, compiler.identity):
        known.cache_clear()


def fault_inside() -> None:
    def fails(*args: Any) -> Any:
        raise AssertionError("a fault that was put here")

    pipeline.group = fails
    os.environ["NPU_FUSE_VERIFY"] = "0"  # as users have it: the original runs where something of the package fails


def faults(mesh: Any) -> None:
    """One process cannot run a step fused, for good or at one step: all make the same step, and say why."""
    broken = mesh.get_rank() == mesh.size() - 1
    for fault in (no_compiler, fault_inside) if FULL else (no_compiler,):
        environment, real, loaded = dict(os.environ), pipeline.group, dict(build._loaded)
        if broken:
            fault()
        try:
            pair = Pair("LAMB, global norm", mesh, placed(mesh))
            for seed in range(3):
                pair.gradients(seed)
                pair.step()
            pair.compare(fault.__name__)
            told = str(npu_fuse_pass.reports()[-1])
            assert not pair.fused and ("another process" in told) is not broken, told
        finally:
            os.environ.clear()
            os.environ.update(environment)
            pipeline.group = real
            build._loaded.update(loaded)
            ask_again()
    broken = mesh.get_rank() == 0  # the last one's part may be empty
    pair = Pair("LAMB, global norm", mesh, placed(mesh))
    for seed in range(4):
        pair.gradients(seed)
        if seed == 2:  # here one process's gradient is its parameter's own memory
            if broken:
                pair.spread[0].grad = DTensor.from_local(
                    pair.spread[0]._local_tensor, mesh, [Shard(0)], shape=(5, 3), stride=(3, 1)
                )
            pair.plain[0].grad = whole(pair.spread[0].grad).clone()
        before = len(npu_fuse_pass.reports())
        collectives = pair.step()
        assert collectives == (3, 2, 2, 3)[seed], collectives  # agree, go on, decline and agree, agree again
        assert len(npu_fuse_pass.reports()) == before + (seed == 0)
    told = str(npu_fuse_pass.reports()[-1])
    assert ("another process" in told) is not broken and ("share memory" in told) is broken, told
    pair.compare("memory that is shared at one step")


def flat_shards(mesh: Any) -> None:
    """FSDP1: rules without norms are fused; one with norms is refused, and nothing is changed."""
    del mesh
    for name in ("AdamW", "LAMB"):
        npu_fuse_pass.clear_reports()
        sharded = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
        plain = model()
        ours, other = OPTIMIZERS[name](sharded.parameters()), OPTIMIZERS[name](plain.parameters())
        step = npu_fuse_pass.compile_optimizer_(ours).step
        if name == "LAMB":
            before = [p.detach().clone() for p in sharded.parameters()]
            with pytest.raises(npu_fuse_pass.RuleError, match=r"takes norms .*fully_shard"):
                train(sharded, ours, step, range(1))
            assert all(torch.equal(p, b) for p, b in zip(sharded.parameters(), before, strict=True))
            continue
        train(sharded, ours, step, range(4))
        train(plain, other, other.step, range(4))
        check_report(name)
        with FullyShardedDataParallel.summon_full_params(sharded):
            for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
                assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def bucket_views(mesh: Any) -> None:
    """DDP whose gradients are views of its buckets."""
    for make in (OPTIMIZERS["AdamW"], OPTIMIZERS["LAMB"], torch.optim.AdamW):
        npu_fuse_pass.clear_reports()
        plain = model()
        parallel = DistributedDataParallel(model(), process_group=mesh.get_group(), gradient_as_bucket_view=True)
        ours, other = make(parallel.parameters()), make(plain.parameters())
        train(parallel, ours, npu_fuse_pass.compile_optimizer_(ours).step, range(4))
        train(plain, other, other.step, range(4))
        check_report(type(ours).__name__)
        assert len({p.grad.untyped_storage().data_ptr() for p in parallel.parameters()}) == 1  # type: ignore[union-attr]
        for p, q in zip(parallel.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def explained_and_checked(mesh: Any) -> None:
    """What works on copies: `explain`, which changes nothing, and `check_numerics` beside torch's own class."""
    makes = (OPTIMIZERS["AdamW"], OPTIMIZERS["LAMB"], torch.optim.AdamW, lambda ps: torch.optim.SGD(ps, momentum=0.9))
    for make in makes:
        npu_fuse_pass.clear_reports()
        sharded, plain = model(), model()
        shard_fully(sharded, mesh)
        ours, other = make(sharded.parameters()), make(plain.parameters())
        step = npu_fuse_pass.compile_step(ours, check_numerics=True)
        for seed in range(3):
            train(sharded, ours, lambda: None, range(seed, seed + 1))
            explained = npu_fuse_pass.explain(ours)
            assert explained.groups and explained.fallback is None, explained
            step()
            train(plain, other, other.step, range(seed, seed + 1))
        name = type(ours).__name__
        compare(sharded, ours, plain, other, name)
        (report,) = (r for r in npu_fuse_pass.reports() if r.checked_steps)
        assert report.checked_steps == 3 and report.fallback is None, report
        assert (f"torch.optim.{name.removeprefix('NpuFused')}" in report.checked_against) == ("Lamb" not in name)


SCENARIOS = (
    *([fully_and_tensor_parallel] if FULL else []),
    fully,
    tensor_parallel,
    checkpoints,
    gradients_that_lie_otherwise,
    within_a_function,
    stock_classes,
    stock_gradients_that_lie_otherwise,
    dynamo_road,
    norms,
    missing_gradients,
    faults,
    flat_shards,
    bucket_views,
    explained_and_checked,
)


def run(rank: int, world: int, store: str, scenarios: Any = SCENARIOS) -> None:
    """Every scenario, one after the other; all failures in one error."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    mesh = init_device_mesh("cpu", (world,))
    for scenario in scenarios:
        torch._dynamo.reset()
        try:
            scenario(mesh)
        except BaseException as e:
            raise RuntimeError(f"{scenario.__name__}: {type(e).__name__}: {e}") from e
    dist.destroy_process_group()
