"""What the NpuFused classes accept, refuse and keep: signatures, defaults, validation, names of states."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import optimizers
from optimizers import NpuFusedAdam, NpuFusedAdamW, NpuFusedLamb, NpuFusedRMSpropTF, NpuFusedSGD
from tests.support.cases import NPU, ONE_EACH, Case, over
from tests.support.training import parameters, train

CLASSES = [NpuFusedSGD, NpuFusedAdam, NpuFusedAdamW, NpuFusedLamb, NpuFusedRMSpropTF]
REQUIRED = {NpuFusedSGD: {"lr": 0.1}}
classes = pytest.mark.parametrize("cls", CLASSES)

MOMENTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
DEFAULTS: dict[Any, dict[str, Any]] = {
    NpuFusedSGD: {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
    NpuFusedAdam: {**MOMENTS, "weight_decay": 0, "amsgrad": False},
    NpuFusedAdamW: {**MOMENTS, "weight_decay": 1e-2, "amsgrad": False},
    NpuFusedLamb: {**MOMENTS, "eps": 1e-6, "weight_decay": 0, "adam": False, "use_global_grad_norm": False},
    NpuFusedRMSpropTF: {
        "lr": 1e-2,
        "alpha": 0.9,
        "eps": 1e-10,
        "weight_decay": 0,
        "momentum": 0.0,
        "centered": False,
        "decoupled_decay": False,
        "lr_in_momentum": True,
    },
}


def build(cls: Any, params: Any = None, **options: Any) -> Any:
    return cls(parameters() if params is None else params, **{**REQUIRED.get(cls, {}), **options})


@classes
def test_names_order_and_defaults(cls: Any) -> None:
    given = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = ["params", *(["lr"] if cls is NpuFusedSGD else []), *DEFAULTS[cls]]
    assert [p.name for p in given] == names
    assert {p.name: p.default for p in given if p.name in DEFAULTS[cls]} == DEFAULTS[cls]
    others = [p for p in inspect.signature(cls).parameters.values() if p not in given]
    assert all(p.kind is p.KEYWORD_ONLY for p in others)


@classes
def test_group_options_are_plain_and_named_as_in_torch(cls: Any) -> None:
    attributes = {"adam", "use_global_grad_norm"} if cls is NpuFusedLamb else set()
    group = build(cls).param_groups[0]
    assert group.keys() == (DEFAULTS[cls].keys() | {"params", "lr"}) - attributes
    assert {k: v for k, v in group.items() if k in DEFAULTS[cls]}.items() <= DEFAULTS[cls].items()


def test_lamb_options_are_attributes() -> None:
    opt = build(NpuFusedLamb, adam=True, use_global_grad_norm=True)
    assert opt.adam is True
    assert opt.use_global_grad_norm is True
    assert build(NpuFusedLamb).adam is False
    assert build(NpuFusedLamb).use_global_grad_norm is False


def test_sgd_needs_a_learning_rate() -> None:
    with pytest.raises(ValueError, match="lr"):
        NpuFusedSGD(parameters())
    with pytest.raises(ValueError, match="lr"):
        NpuFusedSGD([{"params": parameters(), "lr": 0.1}, {"params": parameters()}])
    assert NpuFusedSGD([{"params": parameters(), "lr": 0.1}]).param_groups[0]["lr"] == 0.1


WRONG: list[tuple[str, Any, str]] = [
    ("lr", -1, "Invalid learning rate: -1"),
    ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
    ("betas", (-0.1, 0.9), "Invalid beta parameter at index 0: -0.1"),
    ("betas", (1.0, 0.9), "Invalid beta parameter at index 0: 1.0"),
    ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0"),
    ("betas", (0.9, -1), "Invalid beta parameter at index 1: -1"),
    ("weight_decay", -0.5, "Invalid weight_decay value: -0.5"),
    ("momentum", -0.5, "Invalid momentum value: -0.5"),
    ("alpha", -0.5, "Invalid alpha value: -0.5"),
]
LABELS = {
    "lr": "Invalid learning rate: ",
    "eps": "Invalid epsilon value: ",
    "weight_decay": "Invalid weight_decay value: ",
    "alpha": "Invalid alpha value: ",
    "momentum": "Invalid momentum value: ",
    "dampening": "Invalid dampening value: ",
}
FLAGS = ("amsgrad", "nesterov", "centered", "decoupled_decay", "lr_in_momentum", "adam", "use_global_grad_norm")
NO_NUMBERS = (float("nan"), float("inf"), -float("inf"), "0.1", None, True, 1j, [0.1], torch.ones(2))
NONSENSE: list[tuple[str, Any, str]] = [
    *((name, value, label) for value in NO_NUMBERS for name, label in LABELS.items()),
    *(("betas", value, "Invalid betas value: ") for value in (0.9, (0.9,), (0.9, 0.9, 0.9), None, "ab")),
    ("betas", (0.9, float("nan")), "Invalid beta parameter at index 1: nan"),
    ("betas", ("a", 0.9), "Invalid beta parameter at index 0: 'a'"),
    *((name, value, f"Invalid {name} value: ") for value in (1, None, "yes", 0.5) for name in FLAGS),
]


@pytest.mark.parametrize(("name", "value", "message"), [*WRONG, *NONSENSE], ids=str)
def test_wrong_hyperparameters(name: str, value: Any, message: str) -> None:
    """In the constructor, in a group, in add_param_group and in load_state_dict; nothing is changed."""
    having = [c for c in CLASSES if name in inspect.signature(c).parameters]
    assert having
    for cls in having:
        check = pytest.raises(ValueError, match=r"\(allowed: ")
        with check as error:
            build(cls, **{name: value})
        assert str(error.value).startswith(message)
        assert repr(value) in str(error.value) or name == "betas"
        if name in ("adam", "use_global_grad_norm"):
            continue
        with check:
            build(cls, [{"params": parameters()}, {"params": parameters(), name: value}])
        opt = build(cls)
        added = {"params": parameters(), name: value}
        with check:
            opt.add_param_group(added)
        assert len(opt.param_groups) == 1
        assert added.keys() == {"params", name}
        saved = opt.state_dict()
        saved["param_groups"][0].update({name: value, "lr": 0.7} if name != "lr" else {name: value})
        before = dict(opt.param_groups[0])
        with check:
            opt.load_state_dict(saved)
        assert opt.param_groups[0] == before


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0}, {"momentum": -0.5}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.0, "dampening": 1}],
    ids=str,
)
def test_nesterov_needs_momentum_without_dampening(options: dict[str, Any]) -> None:
    for kind in (ValueError, TypeError):
        with pytest.raises(kind, match="Nesterov momentum requires a momentum and zero dampening"):
            build(NpuFusedSGD, nesterov=True, **options)
        opt = build(NpuFusedSGD)
        with pytest.raises(kind, match="Nesterov momentum requires a momentum and zero dampening"):
            opt.add_param_group({"params": parameters(), "nesterov": True, **options})
        assert len(opt.param_groups) == 1
    if options.get("momentum", 0) < 0:
        with pytest.raises(ValueError, match=r"^Invalid momentum value: -0.5"):
            build(NpuFusedSGD, nesterov=True, **options)


@classes
def test_what_is_accepted(cls: Any) -> None:
    """Numbers of any kind, tensors of one, lists of betas, options of groups, unknown keys of groups."""
    own = inspect.signature(cls).parameters
    for value in (0, 0.0, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert build(cls, lr=value).param_groups[0]["lr"] == value
    if "betas" in own:
        assert build(cls, betas=[0.5, 0.25]).param_groups[0]["betas"] == (0.5, 0.25)
        assert build(cls, betas=(0, 0)).param_groups[0]["betas"] == (0, 0)
    opt = build(cls, [{"params": parameters(), "lr": 0.5, "name": "a"}, {"params": parameters()}], lr=0.25)
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.25]
    assert opt.param_groups[0]["name"] == "a"
    opt.add_param_group({"params": parameters(), "weight_decay": 0.5})
    assert [g["weight_decay"] for g in opt.param_groups][2] == 0.5
    named = torch.nn.Linear(2, 2).named_parameters()
    assert build(cls, named).param_groups[0]["param_names"] == ["weight", "bias"]


@classes
def test_wrong_parameters(cls: Any) -> None:
    leaf = parameters([(2,)])[0]
    for params, kind in (([], ValueError), ([1.0], TypeError), (leaf, TypeError), ([leaf * 2], ValueError)):
        with pytest.raises(kind):
            build(cls, params)
    with pytest.raises(ValueError, match="more than one"):
        build(cls, [{"params": [leaf]}, {"params": [leaf]}])
    with pytest.warns(UserWarning, match="duplicate"):
        build(cls, [leaf, leaf])


@over(NPU)
def test_state_names(case: Case) -> None:
    params = parameters()
    opt = case.build(params)
    assert not opt.state
    train(params, opt.step, seeds=range(3))
    for p in params:
        if case.states:
            assert set(opt.state[p]) == {"step", *case.states}
            assert opt.state[p]["step"].shape == ()
            assert opt.state[p]["step"].item() == 3
        assert all(opt.state[p][name].shape == p.shape for name in case.states)
    saved = opt.state_dict()["state"]
    assert all(set(entry) == {"step", *case.states} for entry in saved.values())
    assert all(entry["step"].dtype is torch.float32 and entry["step"].shape == () for entry in saved.values())


def test_first_values_of_states() -> None:
    """square_avg starts at one: with alpha = 1 it never moves; everything else starts at zero."""
    (p,) = parameters([(3,)])
    opt = NpuFusedRMSpropTF([p], alpha=1.0, momentum=0.5, centered=True)
    p.grad = torch.ones(3)
    opt.step()
    assert torch.equal(opt.state[p]["square_avg"], torch.ones(3))
    assert not opt.state[p]["grad_avg"].any()


@classes
def test_no_attribute_of_the_original_scaler(cls: Any) -> None:
    assert not hasattr(cls, "is_fused_optimizer")
    assert not hasattr(build(cls), "is_fused_optimizer")


def test_public_names() -> None:
    assert {*optimizers.__all__} == {row.optimizer for row in optimizers.ROWS} - {"paddle.RMSProp"}
    assert {c.__name__ for c in CLASSES} <= {*optimizers.__all__}
    assert all(isinstance(case.build(parameters()), torch.optim.Optimizer) for case in ONE_EACH)
    assert all(getattr(optimizers, row.optimizer) is row.make for row in optimizers.ROWS if "." not in row.optimizer)
