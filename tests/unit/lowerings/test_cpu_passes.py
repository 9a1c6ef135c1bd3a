"""In which pass over memory a kernel writes: before the last one where that moves fewer bytes and nothing is missed.

Every rule here has a reduction. What its kernel moves is counted from the generated text, what it computes is compared
with the rule's mathematics in float64, and its bits with those of the same kernel when everything is written last.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass import rule, total, zeros
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.lowerings.cpu import kernel as cpu_kernel
from npu_fuse_pass.lowerings.cpu.codegen import generate
from npu_fuse_pass.lowerings.kernels import sweeps
from tests.support.cases import BY_NAME
from tests.support.training import (
    assert_close,
    assert_fused,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# alone in a core's cache, alone in several chunks, too large for that, empty, 0-dim
SHAPES: list[tuple[int, ...]] = [(3, 5), (130, 300), (301, 401), (0,), (), (17,)]
MATRICES = SHAPES[:3]
LR, BETA = 0.1, 0.9

pytestmark = pytest.mark.usefixtures("afresh", "shipped_kernels")


# Rules, each with what it does in float64 and what it has to move --------------------------------------------------


@rule(states={"m": zeros, "v": zeros}, defaults=dict(lr=LR, beta=BETA))
def scaled(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, lr: Tensor, beta: Tensor) -> Any:
    """Needs of the gradient nothing but what both states keep."""
    m, v = beta * m + (1 - beta) * grad, beta * v + (1 - beta) * grad * grad
    update = m / (v.sqrt() + 0.1)
    return param - lr * update / (1 + update.norm()), m, v


@rule(states={"m": zeros}, defaults=dict(lr=LR, beta=BETA))
def needs_old(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor, beta: Tensor) -> Any:
    """The state's change, which is not known any more once the state is written."""
    new = beta * m + (1 - beta) * grad
    return param - lr * (new - m) / (1 + new.norm()), new


@rule(states={"m": zeros}, defaults=dict(lr=LR, beta=BETA))
def needs_grad(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor, beta: Tensor) -> Any:
    """The gradient is read again in any case: writing early gains nothing."""
    new = beta * m + (1 - beta) * grad
    return param - lr * (new + grad) / (1 + new.norm()), new


@rule(states={"m": zeros, "v": zeros}, defaults=dict(lr=LR, beta=BETA))
def one_of_two(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, lr: Tensor, beta: Tensor) -> Any:
    """The first state has to wait for the norm, the second one need not, and no pass reads it again."""
    norm = grad.norm()
    m, v = beta * m + grad / (1 + norm), beta * v + (1 - beta) * grad.abs()
    return param - lr * m, m, v


@rule(states={"m": zeros}, defaults=dict(lr=LR, beta=BETA))
def two_norms(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor, beta: Tensor) -> Any:
    """The state waits for one norm and not for the other: the second of three passes writes it."""
    m = beta * m + (1 - beta) * grad / (1 + grad.norm())
    return param - lr * m / (1 + m.norm()), m


NORM_OF_ALL = {"square": total(lambda grad, m, beta: (beta * m + (1 - beta) * grad).square().sum())}


@rule(states={"m": zeros}, defaults=dict(lr=LR, beta=BETA), totals=NORM_OF_ALL)
def common_norm(param: Tensor, grad: Tensor, m: Tensor, *, square: Tensor, lr: Tensor, beta: Tensor) -> Any:
    """The norm of all new states: what adds it up writes them."""
    m = beta * m + (1 - beta) * grad
    return param - lr * m / (1 + square.sqrt()), m


@rule(states={"m": zeros}, defaults=dict(lr=LR, beta=BETA), totals=NORM_OF_ALL)
def waits_for_all(param: Tensor, grad: Tensor, m: Tensor, *, square: Tensor, lr: Tensor, beta: Tensor) -> Any:
    """The state itself waits for the norm of all."""
    m = beta * m + (1 - beta) * grad / (1 + square.sqrt())
    return param - lr * m, m


@dataclasses.dataclass(frozen=True)
class Early:
    """A rule, the bytes for each float32 element that it has to move, and those if everything were written last."""

    rule: Any
    bytes: int
    late: int
    states: tuple[str, ...] = ("m",)

    def __str__(self) -> str:
        return str(self.rule.name)


RULES = [
    Early(scaled, 12 + 8 + 12 + 4, 12 + 28, ("m", "v")),
    Early(needs_old, 8 + 20, 8 + 20),
    Early(needs_grad, 8 + 20, 8 + 20),
    Early(one_of_two, 4 + 28, 4 + 28, ("m", "v")),
    Early(two_norms, 4 + 8 + 4 + 8 + 4, 4 + 8 + 20),
    Early(common_norm, 8 + 4 + 8 + 4, 8 + 20),
    Early(waits_for_all, 8 + 20, 8 + 20),
]
every_rule = pytest.mark.parametrize("case", RULES, ids=str)


def moved(text: str, name: str) -> int:
    """Bytes for each element, counted from a kernel's text: what its passes load and store, each tensor once a pass."""
    sizes = {"float": 4, "double": 8, "half": 2, "bfloat": 2}
    found = 0
    for body in re.findall(rf"^static void {name}\w*_pass\d\(.*?^}}", text, re.DOTALL | re.MULTILINE):
        types = {t: stored for stored, t in re.findall(r"(\w+)\* __restrict__ (t\d+) =", body)}
        loads, stores = set(re.findall(r"widen\((t\d+)\[i\]\)", body)), set(re.findall(r"(t\d+)\[i\] = ", body))
        found += sum(sizes[types[t]] for t in [*loads, *stores])
    return found


@dataclasses.dataclass
class Run:
    """Compiled steps of an optimizer: parameters and states after them, and the texts that were generated."""

    params: list[torch.nn.Parameter]
    states: list[Tensor]
    texts: list[str]

    @property
    def tensors(self) -> list[Tensor]:
        return [p.detach() for p in self.params] + self.states


def run(make: Callable[[Any], Any], states: Sequence[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Run:
    texts: list[str] = []

    def recorded(*args: Any) -> Any:
        source = generate(*args)
        texts.append(source.text)
        return source

    monkeypatch.setattr(cpu_kernel, "generate", recorded)
    params = parameters(SHAPES, dtype)
    opt = make(params)
    step = compiled(opt)
    train(params, step, seeds=range(3))
    step.check(len(SHAPES))
    return Run(params, [opt.state[p][name] for name in states for p in params], texts)


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written by the last pass."""
    monkeypatch.setattr(sweeps._Search, "_early", lambda *_: ())


def oracle(case: Early) -> list[Tensor]:
    """The rule's mathematics in float64, with plain tensors."""
    params = [p.detach().double() for p in parameters(SHAPES)]
    states = [[torch.zeros_like(p) for p in params] for _ in case.states]
    for seed in range(3):
        grads = [g.double() for g in gradients(params, seed)]
        grads = [g.to(F32).double() for g in grads]
        given: dict[str, Any] = dict(lr=LR, beta=BETA)
        if case.rule.totals:
            new = [BETA * m + (1 - BETA) * g for m, g in zip(states[0], grads, strict=True)]
            given["square"] = torch.stack([m.square().sum() for m in new]).sum()
        made = [case.rule.function(p, g, *rest, **given) for p, g, *rest in zip(params, grads, *states, strict=True)]
        params, *states = (list(column) for column in zip(*made, strict=True))
    return [*params, *(s for of_one in states for s in of_one)]


# What is written when ------------------------------------------------------------------------------------------------


@every_rule
def test_the_fewest_bytes_the_same_bits(case: Early, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(lambda params: case.rule(params), case.states, F32, monkeypatch)
    [row] = [g for g in last_report().groups if g.bytes_per_element]  # the 0-dim parameter moves none
    [text] = [t for t in made.texts if row.name in t]
    assert row.bytes_per_element == moved(text, row.name) == case.bytes
    assert_close(made.tensors, oracle(case))
    late(monkeypatch)
    torch._dynamo.reset()
    last = run(lambda params: case.rule(params), case.states, F32, monkeypatch)
    assert max(g.bytes_per_element for g in last_report().groups) == case.late
    assert all(torch.equal(a, b) for a, b in zip(made.tensors, last.tensors, strict=True))


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "size", "last"),
    [(F32, None, 40, 44), (F64, None, 80, 88), (BF16, F32, 32, 34), (BF16, None, 22, 22), (F16, None, 22, 22)],
    ids=str,
)
def test_lamb(
    dtype: torch.dtype, state_dtype: torch.dtype | None, size: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is computed from moments as they were before memory rounds them: those of half precision come last."""

    def make(params: Any) -> Any:
        return BY_NAME["lamb"].build(params, state_dtype=state_dtype)

    made = run(make, ("exp_avg", "exp_avg_sq"), dtype, monkeypatch)
    assert max(g.bytes_per_element for g in last_report().groups) == size
    eager = parameters(SHAPES, dtype)
    opt = make(eager)
    train(eager, opt.step, seeds=range(3))
    assert_close(made.params, eager)
    late(monkeypatch)
    torch._dynamo.reset()
    other = run(make, ("exp_avg", "exp_avg_sq"), dtype, monkeypatch)
    assert max(g.bytes_per_element for g in last_report().groups) == last
    assert all(torch.equal(a, b) for a, b in zip(made.tensors, other.tensors, strict=True))


def test_a_value_that_memory_rounds_is_not_read_from_there() -> None:
    """By hand: what captured graphs write has the dtype of the tensor, but a formula may come from elsewhere."""
    text = """slot 0: {}
slot 1: f32
slot 2: f32
slot 3: f32
%0: f32[] = mul($2, $3)
%1: f32[] = mul(%0, $1)
%2: f64[] = cast(%1, f64)
%3: f64 = sum(%2)
%4: f32 = cast(%3, f32)
%5: f64[] = mul(%2, %2)
%6: f64[] = mul(%5, %3)
%7: f32[] = cast(%6, f32)
write $0 = %5
write $1 = %7"""
    exact, rounded = (sweeps.schedule(parse(text.format(dtype))).bytes for dtype in ("f64", "f32"))
    assert exact == [12 + 8 + 8 + 4] and rounded == [12 + 12 + 4 + 4]


# What must not be touched --------------------------------------------------------------------------------------------


def test_contributions_that_are_computed_twice_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of all new states depends on a norm of all gradients, so that it is right in the second round only."""
    both = [parameters(MATRICES), parameters(MATRICES)]
    opts = [common_norm(params) for params in both]

    def tail(k: int) -> None:
        torch.nn.utils.clip_grad_norm_(both[k], 1.0)
        opts[k].step()

    step = torch.compile(lambda: tail(0), backend="npu_fused", fullgraph=True)
    for seed in range(3):
        for params in both:
            set_gradients(params, [3 * g for g in gradients(params, seed)])
        step()
        tail(1)
    assert_close(both[0], both[1], 2e-5)
    assert_fused(last_report(), parameters=len(MATRICES))
    [row] = last_report().groups
    assert (row.launches, row.bytes_per_element) == (3, 8 + 8 + 12 + 12)  # g, m; again; p, g, m, which are all written


@pytest.mark.parametrize("make", [scaled, common_norm], ids=lambda r: r.name)
def test_the_same_bits_with_every_number_of_threads(make: Any) -> None:
    """Also where it decides which parameters one thread takes alone."""
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch._dynamo.reset()
        torch.set_num_threads(count)
        params = parameters(SHAPES)
        opt = make(params)
        step = compiled(opt)
        train(params, step, seeds=range(2))
        step.check(len(SHAPES))
        found.append([*params, *(opt.state[p]["m"] for p in params)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_memory_that_is_shared_is_found_before_anything_is_written() -> None:
    """One parameter's gradient lies in the state of another, which the first pass would overwrite."""
    both = [parameters([(4, 5), (4, 5)]), parameters([(4, 5), (4, 5)])]
    opts = [scaled(params) for params in both]
    step = compiled(opts[0], fullgraph=False)
    for seed in range(3):
        for params, opt in zip(both, opts, strict=True):
            set_gradients(params, gradients(params, seed))
            if seed:
                params[0].grad = opt.state[params[1]]["m"]
        step()
        opts[1].step()
    assert_close(both[0], both[1], 1e-6)
    assert any("share memory" in said for said in step.said)
