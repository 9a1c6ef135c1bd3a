"""Rules from a module, a script run as __main__, and notebook cells: they work, are copied, and go through pickle."""

from __future__ import annotations

import copy
import linecache
import os
import pathlib
import pickle
import sys
import threading
from typing import Any

import pytest
import torch

import npu_fuse_pass
from tests.support.forked import run_script
from tests.support.training import (
    assert_close,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]

MODULE = """
import torch as t
from npu_fuse_pass import rule, total, zeros

FACTOR = 0.5

def halved(x):
    return FACTOR * x

@rule(states={"m": zeros, "extra": zeros.when(lambda group: group["more"])},
      totals={"square": total(lambda grad: grad.square().sum())},
      defaults=dict(lr=0.1, more=False))
def mine(param, grad, m, extra, *, lr, step, square):
    m = halved(m) + grad / t.clamp(square.sqrt(), min=1)
    return param - lr * m / t.sqrt(step), m, extra
"""
CELL = """
from npu_fuse_pass import rule, zeros

@rule(states=dict(m=zeros), defaults=dict(lr=0.5))
def cell(param, grad, m, *, lr):
    m = {formula}
    return param - lr * m, m
"""
COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
copies = pytest.mark.parametrize("copied", COPIES, ids=["deep", "dump"])


def goes_on(opt: Any, params: Any, copied: Any) -> None:
    """A copy after compiled steps does what the original does, compiled, and is fused."""
    step = compiled(opt)
    train(params, step, seeds=range(2))
    step.check(len(params))
    others, other = copied((params, opt))
    train(params, step, seeds=range(2, 4))
    again = compiled(other)
    train(others, again, seeds=range(2, 4))
    again.check(len(params))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.fixture(name="user_module")
def _user_module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import my_rules

    yield my_rules
    del sys.modules["my_rules"]


@copies
def test_a_module_of_the_user(user_module: Any, copied: Any) -> None:
    params = parameters()
    opt = user_module.mine(params, lr=0.2)
    goes_on(opt, params, copied)
    assert copied(user_module.mine) is user_module.mine
    assert len(pickle.dumps(user_module.mine)) < 200  # by name
    train(params, opt.step)


def cell(formula: str, scope: dict[str, Any] | None = None, source: str = CELL) -> dict[str, Any]:
    """Run a notebook cell: code without a file, in __main__."""
    scope = {"__name__": "__main__"} if scope is None else scope
    exec(compile(source.format(formula=formula), "<ipython-input-7-0123456789ab>", "exec"), scope)
    assert not linecache.getlines("<ipython-input-7-0123456789ab>")
    return scope


@copies
def test_a_notebook_cell(copied: Any) -> None:
    made = cell("0.5 * m + grad")["cell"]
    params = parameters()
    goes_on(made(params), params, copied)
    assert copied(made).defaults == {"lr": 0.5}


def test_a_cell_that_is_run_again() -> None:
    """Optimizers made afterwards use the new formula, compiled as well; those made before keep theirs."""
    scope = cell("0.5 * m + grad")
    first, second = parameters(), parameters()
    old = scope["cell"](first)
    old_step = compiled(old)
    train(first, old_step, seeds=[0])
    old_name = last_report().groups[0].name
    cell("0.25 * m - grad", scope)
    new = scope["cell"](second)
    new_step = compiled(new)
    train(second, new_step, seeds=[0])
    new_step.check(len(second))
    assert last_report().groups[0].name != old_name
    before = parameters()
    for p, q, r, g in zip(before, first, second, gradients(before, 0), strict=True):
        assert_close([q, r], [p - 0.5 * g, p + 0.5 * g], 1e-6)
    others = pickle.loads(pickle.dumps(new))
    train(first, old_step, seeds=[1])
    train(second, new_step, seeds=[1])
    gs = zip(gradients(before, 0), gradients(before, 1), strict=True)
    for p, q, r, (g, h) in zip(before, first, second, gs, strict=True):
        assert_close([q], [p - 0.5 * g - 0.5 * (0.5 * g + h)], 1e-6)
        assert_close([r], [p + 0.5 * g - 0.5 * (-0.25 * g - h)], 1e-6)
    copied = others.param_groups[0]["params"]
    train(copied, compiled(others), seeds=[1])
    assert all(torch.equal(a, b) for a, b in zip(copied, second, strict=True))


def test_the_same_cell_again_shares_the_kernel() -> None:
    names = []
    for _ in range(2):
        params = parameters()
        train(params, compiled(cell("0.5 * m + grad")["cell"](params)))
        names.append([g.name for g in last_report().groups])
    assert names[0] == names[1]


CLOSURE = """
import threading
from npu_fuse_pass import rule, zeros

square = lock = threading.Lock()      # not picklable; the rule has a method of this name, and reads none of them
mean = opt = step = (i for i in [])
factor = 3.0

def make(factor):
    def scaled(x):
        return factor * inner(x)
    def inner(x):
        return x.square() / (1 + x.square().mean())
    @rule(states=dict(m=zeros), defaults=dict(lr=0.5))
    def cell(param, grad, m, *, lr):
        return param - lr * scaled(grad), {formula}
    return cell

cell = make(0.25)
"""


@copies
def test_closures_and_names_of_methods(copied: Any) -> None:
    """A rule may close over values and functions; globals that only share a method's name do not matter."""
    params = parameters()
    goes_on(cell("m + grad", source=CLOSURE)["cell"](params), params, copied)


def test_what_cannot_be_pickled_is_said() -> None:
    scope = cell("m + grad + (lock is None)", source=CLOSURE)
    with pytest.raises(pickle.PicklingError, match=r"lock.*cannot be pickled; pass it as a default"):
        pickle.dumps(scope["cell"](parameters()))
    params = parameters()
    opt = copy.deepcopy(scope["cell"](params))  # a deep copy needs no pickle
    assert isinstance(opt, npu_fuse_pass.RuleOptimizer)
    assert isinstance(scope["lock"], type(threading.Lock()))


SCRIPT = (
    MODULE
    + """
import pickle, sys, torch, npu_fuse_pass

def train(params, opt, seeds):
    step = torch.compile(opt.step, backend="npu_fused", options={{"strict": True}})
    for seed in seeds:
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape)
        step()
    return npu_fuse_pass.reports()[-1].groups[0].name

torch.manual_seed(7)
model = torch.nn.Linear(5, 3)
params = list(model.parameters())
opt = mine(params, lr=0.2)
first = train(params, opt, [1, 2])
saved = pickle.dumps((params, opt))
train(params, opt, [3])
open({path!r}, "wb").write(pickle.dumps((saved, params, first)))
"""
)
LOADER = """
import pickle, sys, torch, npu_fuse_pass

saved, want, name = pickle.load(open({path!r}, "rb"))
params, opt = pickle.loads(saved)
assert "mine" not in globals() and "my_rules" not in sys.modules
step = torch.compile(opt.step, backend="npu_fused", options={{"strict": True}})
torch.manual_seed(3)
for p in params:
    p.grad = torch.randn(p.shape)
step()
assert all(torch.equal(a, b) for a, b in zip(params, want)), (params, want)
assert [g.name for g in npu_fuse_pass.reports()[-1].groups] == [name]
assert opt.param_groups[0]["lr"] == 0.2 and float(opt.state[params[0]]["step"]) == 3
again = pickle.loads(pickle.dumps(opt))
for p in again.param_groups[0]["params"]:
    p.grad = torch.ones_like(p)
again.step()
print("done")
"""


def run(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_script(path, cwd=path.parent, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script(tmp_path: pathlib.Path) -> None:
    """A rule in __main__: compiled, pickled, and loaded by another script, which goes on with the same bits."""
    path = str(tmp_path / "saved.pickle")
    run(tmp_path / "script.py", MODULE + SCRIPT[len(MODULE) :].format(path=path))
    assert run(tmp_path / "loader.py", LOADER.format(path=path)).strip() == "done"


def test_a_renamed_or_deleted_rule(user_module: Any) -> None:
    """By name only where the name still leads to it; else by value."""
    kept = user_module.mine
    params = parameters()
    opt = kept(params)
    user_module.mine = None
    others, other = pickle.loads(pickle.dumps((params, opt)))
    assert other.rule is not kept
    set_gradients(params, gradients(params, 0))
    set_gradients(others, gradients(params, 0))
    opt.step()
    compiled(other)()
    assert_close(others, clones(params), 1e-6)
