"""State dicts: memory, files, torch.distributed.checkpoint, and what is refused when one is loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import npu_fuse_pass
import optimizers
from npu_fuse_pass import rule, zeros
from tests.support.cases import ONE_EACH, Case, over
from tests.support.forked import FORKS
from tests.support.training import (
    assert_close,
    assert_fused,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)
from tests.support.unchanged import Unchanged

TORCH_TWINS = [
    (optimizers.NpuFusedAdam, torch.optim.Adam, dict(lr=0.1)),
    (optimizers.NpuFusedAdamW, torch.optim.AdamW, dict(lr=0.1, amsgrad=True)),
    (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
]


def tensors(saved: dict[str, Any]) -> list[tuple[int, str, torch.Tensor]]:
    return [(i, n, t) for i, entry in saved["state"].items() for n, t in entry.items() if n != "step"]


def owned(t: torch.Tensor) -> bool:
    """Whether a tensor is all that its memory holds."""
    return t.untyped_storage().nbytes() == t.numel() * t.itemsize


@over(ONE_EACH)
def test_a_state_dict_shares_the_states_memory(case: Case) -> None:
    """As torch's: it takes no memory, and follows the next step."""
    params = parameters([(100,), (3, 4)])
    opt = case.build(params)
    train(params, opt.step, seeds=range(2))
    saved = opt.state_dict()
    before = copy.deepcopy(saved)
    for i, name, t in tensors(saved):
        assert t.data_ptr() == opt.state[params[i]][name].data_ptr()
    train(params, opt.step, seeds=[5])
    for i, name, t in tensors(saved):
        assert torch.equal(t, opt.state[params[i]][name])
        assert not torch.equal(t, before["state"][i][name])


def test_a_state_dict_costs_later_steps_nothing() -> None:
    """Its tensors are not watched: who gives them other memory (`.data =`) changes the state dict alone."""
    params = parameters([(8,)])
    opt = optimizers.NpuFusedAdam(params)
    train(params, opt.step, seeds=range(2))
    opt.state_dict()["state"][0]["exp_avg"].data = torch.zeros(8)
    assert not opt.state.changes.moved and not opt.state.changes.made
    assert opt.state[params[0]]["exp_avg"].abs().sum() > 0


def test_files_hold_every_value_once(tmp_path: Path) -> None:
    """torch.save of all, and of a part of a compact one."""
    params = parameters([(1000,)] * 50)
    opt = optimizers.NpuFusedAdam(params)
    train(params, opt.step, seeds=[0])
    torch.save(opt.state_dict(), tmp_path / "all")
    assert (tmp_path / "all").stat().st_size < 1.3 * 2 * 50 * 1000 * 4
    part = npu_fuse_pass.compact(opt.state_dict()["state"][3])
    torch.save(part, tmp_path / "part")
    assert (tmp_path / "part").stat().st_size < 1.3 * 2 * 1000 * 4
    loaded = torch.load(tmp_path / "all", weights_only=True)
    assert all(torch.equal(t, opt.state[params[i]][n]) for i, n, t in tensors(loaded))


def test_compact() -> None:
    """Each tensor has memory of its own, as some libraries ask; values, order in memory and the rest are kept."""
    params = [torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)), *parameters([(3,)])]
    opt = optimizers.NpuFusedLamb(params)
    train(params, opt.step, seeds=range(2))
    saved = opt.state_dict()
    made = npu_fuse_pass.compact(saved)
    assert made["param_groups"] == saved["param_groups"]
    for (i, n, t), (j, m, c) in zip(tensors(saved), tensors(made), strict=True):
        assert (i, n) == (j, m) and torch.equal(t, c) and t.stride() == c.stride()
        assert not owned(t) and owned(c)
    train(params, opt.step, seeds=[5])
    assert not any(torch.equal(t, c) for (_, _, t), (_, _, c) in zip(tensors(saved), tensors(made), strict=True))


def without(name: str) -> Any:
    return lambda entry: entry.pop(name)


def become(**entry: Any) -> Any:
    def edit(state: dict[str, Any]) -> None:
        state.clear()
        state.update(entry)

    return edit


REFUSED: list[tuple[str, Any, str]] = [
    ("no first moment", without("exp_avg"), "parameter 1 has 'step', 'exp_avg_sq' and lacks 'exp_avg'"),
    ("no second moment", without("exp_avg_sq"), "parameter 1 has 'step', 'exp_avg' and lacks 'exp_avg_sq'"),
    ("no step", without("step"), "parameter 1 has 'exp_avg', 'exp_avg_sq' and lacks 'step', which adam computes with"),
    ("SGD's", become(momentum_buffer=torch.zeros(3)), "'momentum_buffer', of another optimizer; adam keeps 'exp_avg',"),
    ("a string", lambda s: s.update(exp_avg="x"), "state 'exp_avg' of parameter 1 is 'x'"),
    ("a shape", lambda s: s.update(exp_avg=torch.ones(4)), r"state 'exp_avg' of parameter 1 is .* shape \(4,\)"),
    ("two steps", lambda s: s.update(step=torch.zeros(2)), "state 'step' of parameter 1 is"),
]


@pytest.mark.parametrize(("edit", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_states_that_no_step_can_go_on_from_are_refused(edit: Any, message: str) -> None:
    """At load, by name; nothing is changed, and a whole checkpoint is taken afterwards."""
    params, others = parameters([(2, 3), (3,)]), parameters([(2, 3), (3,)])
    opt, other = optimizers.NpuFusedAdam(params, lr=0.1), optimizers.NpuFusedAdam(others, lr=0.2)
    train(params, opt.step, seeds=range(3))
    train(others, other.step, seeds=[7])
    good = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(good)
    edit(bad["state"][1])
    unchanged = Unchanged(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(bad)
    unchanged()
    other.load_state_dict(good)
    assert all(torch.equal(t, other.state[others[i]][n]) for i, n, t in tensors(good))


def test_an_entry_that_is_no_mapping_is_refused() -> None:
    params = parameters([(3,)])
    opt = optimizers.NpuFusedAdam(params)
    train(params, opt.step, seeds=[0])
    for entry in (7, None):
        saved = {**opt.state_dict(), "state": {0: entry}}
        with pytest.raises(ValueError, match=f"the saved state of parameter 0 is {entry}; allowed is a dict"):
            opt.load_state_dict(saved)


def test_states_that_may_be_absent_may_be_absent() -> None:
    """torch.optim.SGD keeps no counter, and None for a buffer not made yet; a new parameter has no entry."""
    for momentum in (0.0, 0.9):
        params, others = parameters([(3,), (4,)]), parameters([(3,), (4,)])
        stock = torch.optim.SGD(params, lr=0.1, momentum=momentum)
        params[0].grad = torch.ones(3)
        stock.step()
        opt = optimizers.NpuFusedSGD(others, lr=0.1)
        opt.load_state_dict(stock.state_dict())
        assert opt.param_groups[0]["momentum"] == momentum
        train(others, opt.step, seeds=[1])


@rule(states={"buf": zeros}, defaults=dict(lr=0.1, mu=0.9))
def earlier(param, grad, buf, *, lr, mu):  # type: ignore[no-untyped-def]
    new = mu * buf + grad
    return param - lr * new, new


@rule(states={"buf": zeros}, defaults=dict(lr=0.1, mu=0.9, wd=0.25))
def later(param, grad, buf, *, lr, mu, wd):  # type: ignore[no-untyped-def]
    new = mu * buf + grad + wd * param
    return param - lr * new, new


@pytest.mark.parametrize(("options", "wd"), [({}, 0.25), ({"wd": 0.5}, 0.5)])
def test_a_hyperparameter_that_a_checkpoint_lacks_keeps_its_default(options: dict[str, Any], wd: float) -> None:
    params = parameters([(3,), (2, 2)])
    old = earlier(params, lr=0.2)
    train(params, old.step, seeds=range(2))
    others, twins = clones(params), clones(params)
    new, twin = later(others, **options), later(twins, lr=0.2, wd=wd)
    for opt in (new, twin):
        opt.load_state_dict(copy.deepcopy(old.state_dict()))
    assert {n: new.param_groups[0][n] for n in ("lr", "mu", "wd")} == {"lr": 0.2, "mu": 0.9, "wd": wd}
    bufs = [old.state[p]["buf"].clone() for p in params]
    train(others, compiled(new), seeds=[9])
    assert_fused(last_report(), parameters=2)
    want = [p - 0.2 * (0.9 * b + q.grad + wd * p) for p, b, q in zip(params, bufs, others, strict=True)]
    assert_close(others, want)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
@pytest.mark.parametrize(("ours", "stock", "options"), TORCH_TWINS, ids=[o.__name__ for o, _, _ in TORCH_TWINS])
def test_distributed_checkpoints(
    tmp_path: Path, ours: Any, stock: Any, options: dict[str, Any], to_torch: bool
) -> None:
    """What ours saved is read by torch's class and the other way round; the next step is the same."""

    def made(cls: Any, seeds: range) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        opt = cls(model.parameters(), **options)
        train(list(model.parameters()), opt.step, seeds=seeds)
        return model, opt

    source, target = (ours, stock) if to_torch else (stock, ours)
    model, opt = made(source, range(3))
    dcp.save({"o": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    other_model, other = made(target, range(7, 8))
    read = {"o": get_optimizer_state_dict(other_model, other)}
    counter = ours is optimizers.NpuFusedSGD and not to_torch  # which torch.optim.SGD does not keep
    dcp.load(read, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=counter))
    set_optimizer_state_dict(other_model, other, read["o"])
    other_model.load_state_dict(model.state_dict())
    params, others = list(model.parameters()), list(other_model.parameters())
    for p, q in zip(params, others, strict=True):
        names = {n for n, v in opt.state[p].items() if v is not None} - {"step"}
        assert names and all(torch.equal(opt.state[p][n], other.state[q][n]) for n in names)
    train(params, opt.step, seeds=[3])
    train(others, other.step, seeds=[3])
    assert_close(params, others)


def test_groups_hold_torchs_options() -> None:
    """Whoever reads ours into torch's class finds all that its groups have."""
    for ours, stock, options in TORCH_TWINS:
        saved = ours(parameters(), **options).state_dict()["param_groups"][0]
        assert stock(parameters(), **options).state_dict()["param_groups"][0].items() <= saved.items()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "copy", "dump"]
)
def test_copies_have_no_hooks(copied: Any) -> None:
    """As torch.optim's: a hook holds what is the original's, and a lambda cannot be pickled."""
    params = parameters()
    opt = optimizers.NpuFusedAdam(params)
    called: list[str] = []
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))
    opt.register_state_dict_post_hook(lambda *_: called.append("saved"))
    opt.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    other = copied(opt)
    set_gradients(other.param_groups[0]["params"], gradients(params, 0))
    other.step()
    other.load_state_dict(other.state_dict())
    assert not called
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert called == ["saved", "loaded", "before", "after"]


def _one_step(opt: torch.optim.Optimizer) -> None:
    params = opt.param_groups[0]["params"]
    train(params, opt.step, seeds=[2])


@pytest.mark.parametrize("ours", [twin[0] for twin in TORCH_TWINS])
def test_another_process_goes_on(ours: Any) -> None:
    """Torch moves what it pickles for a new process into shared memory: parameters, and a copy of the states."""
    params = parameters()
    opt = ours(params, lr=0.1)
    train(params, opt.step, seeds=[0, 1])
    other = copy.deepcopy(opt)
    _one_step(other)
    process = FORKS.Process(target=_one_step, args=(opt,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_close(params, other.param_groups[0]["params"])
