"""The public decorator `rule`: what it refuses, and what it says then."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass import FuseError, Init, RuleError, RuleOptimizer, rule, total, zeros
from optimizers import lion
from tests.support.rules import same_compiled
from tests.support.training import gradients, parameters, set_gradients


def decided(function: Callable[..., Any], **defaults: Any) -> None:
    """Declare and construct."""
    rule(states={"m": zeros}, defaults={"lr": 0.1, **defaults})(function)(parameters())


def by_if(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    if grad.sum() > 0:
        return param - lr * grad, m
    return param, m


def by_step(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor, step: Tensor) -> Any:
    return (param - lr * grad, grad) if step == 1 else (param - lr * m, m)


def by_lr(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return (param - lr * grad, m) if lr > 0.5 else (param, m)


def by_item(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return param - grad.norm().item() * lr, m


def by_float(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return param - float(lr) * grad, m


def by_math(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor, step: Tensor) -> Any:
    return param - lr / math.sqrt(step) * grad, m


def by_max(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return param - lr * grad / max(grad.norm(), lr), m


def by_range(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor, step: Tensor) -> Any:
    for _ in range(int(step)):
        param = param - lr * grad
    return param, m


def by_tolist(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return param - lr * sum(grad.flatten().tolist()), m


def by_numpy(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return param - lr * torch.from_numpy(grad.numpy()), m


def by_index(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
    return param - lr * grad[grad > 0].sum(), m


@pytest.mark.parametrize(
    "function", [by_if, by_step, by_lr, by_item, by_float, by_math, by_max, by_range, by_tolist, by_numpy]
)
def test_values_decide(function: Callable[..., Any]) -> None:
    with pytest.raises(RuleError, match=r"torch\.where") as error:
        decided(function)
    assert function.__name__ in str(error.value)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, FuseError)


def test_selecting_elements_is_right_or_refused() -> None:
    """grad[grad > 0] has a shape that depends on values: refused at once, or unfused with a warning and right."""
    made = rule(states={"m": zeros}, defaults={"lr": 0.1})(by_index)
    found: list[str] = []
    with contextlib.suppress(RuleError), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = made(parameters())
        found.append("accepted")
        same_compiled(made, fused=False)
        found += [str(w.message) for w in caught if "not fused" in str(w.message)]
        assert opt.param_groups
    assert len(found) != 1


IN_PLACE: dict[str, Callable[..., Any]] = {
    "param": lambda param, grad, m, *, lr, betas: (param.sub_(lr * grad), m),
    "grad": lambda param, grad, m, *, lr, betas: (param - lr * grad.mul_(2), m),
    "m": lambda param, grad, m, *, lr, betas: (param - lr * m.lerp_(grad, 0.1), m),
    "a view of m": lambda param, grad, m, *, lr, betas: (param - lr * grad, m.view(-1).add_(1).view_as(m)),
    "lr": lambda param, grad, m, *, lr, betas: (param - lr.mul_(2) * grad, m),
    "betas": lambda param, grad, m, *, lr, betas: (param - betas[1].mul_(2) * grad, m),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_in_place(what: str) -> None:
    with pytest.raises(RuleError, match="in place") as error:
        decided(IN_PLACE[what], betas=(0.5, 0.25))
    assert what.split()[-1] in str(error.value)


def test_in_place_on_a_value_of_its_own() -> None:
    def own(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
        m = (m * 0.9).add_(grad)
        return param - (m * lr).mul_(2), m

    same_compiled(rule(states={"m": zeros}, defaults={"lr": 0.1})(own))


RETURNS: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (lambda param, grad, m, *, lr: param, "1 values; it must return"),
    "too many": (lambda param, grad, m, *, lr: (param, m, m), "3 values; it must return"),
    "nothing": (lambda param, grad, m, *, lr: None, "must return"),
    "a number": (lambda param, grad, m, *, lr: (param, 1.0), "float.*'m'.*tensor"),
    "a sum": (lambda param, grad, m, *, lr: (param, grad.sum()), r"shape \(\).*'m'.*\(2, 3\)"),
    "a transpose": (lambda param, grad, m, *, lr: (param.t(), m), r"shape \(3, 2\).*'param'"),
    "a broadcast": (lambda param, grad, m, *, lr: (param + grad[None], m), r"shape \(1, 2, 3\).*'param'"),
    "no state": (lambda param, grad, m, *, lr: (param, None), "'m'"),
}


@pytest.mark.parametrize("what", RETURNS)
def test_results(what: str) -> None:
    function, message = RETURNS[what]
    with pytest.raises(RuleError, match=message):
        decided(function)


def test_other_numbers_of_dimensions() -> None:
    """What a rule does with vectors alone is seen before the first step; what fails for its sizes may be right."""

    def decided_by_ndim(of_vectors: Callable[..., Any]) -> None:
        def chosen(param: Tensor, grad: Tensor, m: Tensor, *, lr: Tensor) -> Any:
            return of_vectors(param, grad, m, lr) if param.ndim == 1 else (param - lr * grad, m)

        rule(states={"m": zeros}, defaults={"lr": 0.1})(chosen)(parameters([(2, 3), (7,)]))

    with pytest.raises(RuleError, match="1 values; it must return"):
        decided_by_ndim(lambda param, grad, m, lr: param)
    with pytest.raises(RuleError, match=r"shape \(\) for 'm'"):
        decided_by_ndim(lambda param, grad, m, lr: (param, grad.sum()))
    with pytest.raises(RuleError, match="'grad' in place"):
        decided_by_ndim(lambda param, grad, m, lr: (param - lr * grad.mul_(2), m))
    decided_by_ndim(lambda param, grad, m, lr: (param - lr * grad * torch.ones(7), m))
    decided_by_ndim(lambda param, grad, m, lr: (param - lr * grad * {7: 1.0}[len(grad)], m))


@pytest.mark.parametrize("shapes", [[(8, 4)], [(8, 4), (4,)], [(4,), ()], [(4, 2, 2)]], ids=str)
def test_sizes_that_a_rule_needs(shapes: list[tuple[int, ...]]) -> None:
    """What is right for all parameters is taken, also where it fails on other sizes."""

    @rule(defaults={"lr": 0.1})
    def fours(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
        return param - lr * grad / grad.reshape(-1, 4 if grad.numel() > 1 else 1).norm()

    params = parameters(shapes)
    opt = fours(params)
    grads = gradients(params, 0)
    set_gradients(params, grads)
    want = [p.detach() - 0.1 * g / g.norm() for p, g in zip(params, grads, strict=True)]
    opt.step()
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach(), w)
    with pytest.raises(RuleError, match=r"fails on tensors of shape \(3, 5\)"):
        fours(parameters([*shapes, (3, 5)]))
    with pytest.raises(RuleError, match=r"fails on tensors of shape \(5,\)"):
        fours(parameters([(5,), (6,)]))


def test_a_value_for_a_state_that_the_group_lacks() -> None:
    @rule(states={"m": zeros.when(lambda group: group["momentum"])}, defaults={"lr": 0.1, "momentum": False})
    def sometimes(param: Tensor, grad: Tensor, m: Tensor | None, *, lr: Tensor) -> Any:
        return param - lr * grad, grad

    sometimes(parameters(), momentum=True)
    with pytest.raises(RuleError, match="'m', which this group lacks"):
        sometimes(parameters())
    opt = sometimes(parameters(), momentum=True)
    opt.add_param_group({"params": parameters(), "momentum": False})
    params = opt.param_groups[1]["params"]
    set_gradients(params, gradients(params, 0))
    with pytest.raises(RuleError, match="'m', which this group lacks"):
        opt.step()


def test_hyperparameters() -> None:
    @rule(defaults={"lr": 0.1, "name": "x", "flag": False, "nothing": None, "pair": (1, 2.0)})
    def plain(param: Tensor, grad: Tensor, *, lr: Tensor, name: str, flag: bool, nothing: None, pair: Any) -> Any:
        assert (name, flag, nothing) == ("x", False, None)
        assert all(isinstance(x, Tensor) and x.dtype is torch.float64 and x.ndim == 0 for x in (lr, *pair))
        return param - lr * pair[1] * grad

    same_compiled(plain)
    with pytest.raises(TypeError, match=r"plain\(\) has no hyperparameter 'beta'; allowed are .*'lr'.*'flatten'"):
        plain(parameters(), beta=1)
    with pytest.raises(TypeError, match="has no default for its hyperparameter 'lr'"):
        rule()(lambda param, grad, *, lr: param - lr * grad)(parameters(), lr=1)
    with pytest.raises(RuleError, match=r"lr=\[\] must be a number"):
        plain(parameters(), lr=[])
    for wrong in (torch.ones(2), object(), {"a": 1}, ("a", "b"), (1, None)):
        with pytest.raises(RuleError, match="lr="):
            plain(parameters(), lr=wrong)
    opt = plain([{"params": parameters(), "lr": 0.5}, {"params": parameters()}])
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.1]
    assert isinstance(opt, RuleOptimizer)


@pytest.mark.parametrize(
    "wrong", [[0.9, 0.99], {"a": 1}, torch.ones(()), object(), 1j, zeros, {1}], ids=lambda w: type(w).__name__
)
def test_defaults(wrong: Any) -> None:
    with pytest.raises(RuleError, match="default lr="):
        rule(defaults={"lr": wrong})(lambda param, grad, *, lr: param)


SIGNATURES: dict[str, Callable[..., Any]] = {
    "no gradient": lambda param, *, lr: param,
    "no state": lambda param, grad, *, lr: param,
    "another state": lambda param, grad, n, *, lr: (param, n),
    "more": lambda param, grad, m, n, *, lr: (param, m),
    "positional lr": lambda param, grad, m, lr: (param, m),
    "any": lambda *args: args,
}


@pytest.mark.parametrize("what", SIGNATURES)
def test_signatures(what: str) -> None:
    with pytest.raises(RuleError, match=r"ask for \(param, grad, m, \*, \.\.\.\)"):
        rule(states={"m": zeros}, defaults={"lr": 0.1})(SIGNATURES[what])


def test_reserved_and_unknown_names() -> None:
    for name in ("param", "grad", "step", "params", "flatten", "state_dtype"):
        with pytest.raises(RuleError, match=name):
            rule(defaults={name: 1.0})(lambda param, grad: param)
    with pytest.raises(RuleError, match=r"\['lr'\] are names of more than one"):
        rule(states={"lr": zeros}, defaults={"lr": 0.1})(lambda param, grad, lr: (param, lr))
    with pytest.raises(RuleError, match=r"\['lr'\] are names of more than one"):
        rule(totals={"lr": total(lambda grad: grad.sum())}, defaults={"lr": 0.1})(lambda param, grad, *, lr: param)
    with pytest.raises(RuleError, match=r"takes \*\*others; name each"):
        rule(defaults={"lr": 0.1})(lambda param, grad, **others: param - others["lr"] * grad)
    with pytest.raises(RuleError, match=r"'typo', which is not among its defaults \['lr'"):
        rule(defaults={"lr": 0.1})(lambda param, grad, *, typo: param)(parameters())
    with pytest.raises(RuleError, match="allowed are 'group' and 'optimizer'"):
        total(lambda grad: grad.sum(), over="world")  # type: ignore[arg-type]


def test_a_group_that_lost_a_hyperparameter() -> None:
    made = rule(defaults={"lr": 0.1})(lambda param, grad, *, lr: param - lr * grad)(parameters())
    del made.param_groups[0]["lr"]
    set_gradients(made.param_groups[0]["params"], gradients(made.param_groups[0]["params"], 0))
    with pytest.raises(RuleError, match="asks for 'lr', which this group lacks"):
        made.step()


@pytest.mark.parametrize("what", [0, None, torch.zeros_like, Init("0"), Init(torch.zeros(2)), total(0)])  # type: ignore[arg-type]
def test_states_and_totals_of_another_kind(what: Any) -> None:
    with pytest.raises(RuleError, match=r"state m=.* must be zeros"):
        rule(states={"m": what}, defaults={"lr": 0.1})(lambda param, grad, m, *, lr: (param, m))
    with pytest.raises(RuleError, match=r"total t=.* must be made by total"):
        rule(totals={"t": what})(lambda param, grad, *, t: param)


def test_a_total_must_be_a_number() -> None:
    bad = rule(totals={"t": total(lambda grad: grad)})(lambda param, grad, *, t: param - t)
    with pytest.raises(RuleError, match="must return a 0-dim tensor"):
        bad(parameters())


def test_a_total_of_a_total_is_refused_at_once() -> None:
    totals = {"t": total(lambda grad: grad.sum()), "u": total(lambda grad, t: grad.sum() * t)}
    with pytest.raises(RuleError, match=r"total 'u' of rule .* asks for 't', which it cannot get"):
        rule(totals=totals)(lambda param, grad, *, t, u: param - u * t * grad)(parameters())


def test_a_hyperparameter_called_rounding() -> None:
    def coarse(param: Tensor, grad: Tensor, *, lr: Tensor, rounding: tuple[Tensor, ...]) -> Tensor:
        return param - lr * (grad / rounding[0]).round() * rounding[1]

    same_compiled(rule(defaults={"lr": 0.1, "rounding": (0.5, 0.25, 0.0)})(coarse))


def two_sizes(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    rows, columns = param.shape
    return param - lr * grad / (rows * columns)


def asserted(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    assert param.ndim == 2
    return param - lr * grad


def by_size(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    if param.numel() == 24:
        raise KeyError(param.numel())
    return param - lr * grad


@pytest.mark.parametrize("function", [two_sizes, asserted, by_size], ids=lambda f: f.__name__)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_fails_for_some_shapes_ends_no_step_between_two_parameters(
    function: Callable[..., Any], is_compiled: bool
) -> None:
    params = parameters([(2, 3), (2, 3, 4)])
    opt = rule(defaults={"lr": 0.1})(function)(params)
    set_gradients(params, gradients(params, 0))
    before = [p.detach().clone() for p in params]
    step = torch.compile(opt.step, backend="npu_fused") if is_compiled else opt.step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            RuleError, match=rf"(?s){function.__name__}.* \(2, 3, 4\): .*Error.*test_rule\.py:.*Nothing was"
        ):
            step()
    assert all(map(torch.equal, before, params))
    params[1].grad = None
    step()
    assert not torch.equal(before[0], params[0]) and torch.equal(before[1], params[1])


def test_a_rule_for_vectors_alone() -> None:
    def vectors(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
        (size,) = param.shape
        return param - lr * grad / size

    same_compiled(rule(defaults={"lr": 0.1})(vectors), shapes=[(7,), (5,)])
    with pytest.raises(RuleError, match=r"shape \(2, 3\): ValueError: too many values .*test_rule\.py"):
        rule(defaults={"lr": 0.1})(vectors)(parameters([(7,), (2, 3)]))


@pytest.mark.parametrize("made", [zeros, total(lambda grad: grad.sum())], ids=lambda made: type(made).__name__)
def test_conditions(made: Any) -> None:
    def declared(condition: Any) -> None:
        named = {("states" if made is zeros else "totals"): {"m": made.when(condition)}}
        function: Any = (lambda param, grad, m, *, lr: (param, m)) if made is zeros else lambda param, grad, *, m: param
        rule(defaults={"lr": 0.1}, **named)(function)(parameters())

    for wrong in (True, "lr"):
        with pytest.raises(RuleError, match=r"when\(.*\): allowed is a function of the hyperparameters"):
            declared(wrong)
    with pytest.raises(RuleError, match=r"condition of 'm' fails: KeyError: 'momentum'; .* \['lr'\]"):
        declared(lambda group: group["momentum"])
    with pytest.raises(RuleError, match=r"condition of 'm' fails: TypeError: .*0 positional arguments"):
        declared(lambda: True)


def test_declarations_of_another_kind() -> None:
    with pytest.raises(RuleError, match=r"rule\(states=\['m'\]\): allowed is a dict"):
        rule(states=["m"])  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="with parentheses"):
        rule(two_sizes)  # type: ignore[arg-type]
    for wrong in (5, torch.add):
        with pytest.raises(RuleError, match="a rule is a Python function"):
            rule()(wrong)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="the parameter first"):
        rule()(lambda grad, param: param)


def test_a_tensor_on_another_device() -> None:
    with pytest.raises(RuleError, match=r"does not lie where the parameter does .*zeros_like"):
        decided(lambda param, grad, m, *, lr: (param - lr * torch.ones(3) * grad, m))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({}, "the rule of Mine is None"),
        ({"rule": two_sizes}, "the rule of Mine is 'two_sizes'"),
        ({"rule_for": lambda self, group: None}, "the rule of Mine is None"),
        ({"rule": lion, "hyperparameters": lambda self, group: None}, r"Mine\.hyperparameters gives None"),
        ({"rule": lion, "partitions": lambda self, group: None}, r"Mine\.partitions gives None"),
        ({"rule": lion, "partitions": lambda self, group: group["params"]}, r"Mine\.partitions gives Parameter"),
        (
            {"rule": lion, "partitions": lambda self, group: [(p, {}) for p in group["params"]]},
            r"(?s)Mine\.partitions gives .*list of parameters",
        ),
    ],
    ids=range(7),
)
def test_hooks_of_another_kind(hooks: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        type("Mine", (RuleOptimizer,), hooks)(parameters(), dict(lion.defaults))
