"""The one table of optimizers and options that tests run over; a new optimizer is one more row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import optimizers
from optimizers.paddle import RMSProp

from . import oracles


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer with options.

    Args:
        make: (params, **options) -> optimizer.
        formula: what it computes, from oracles.py.
        states: the states that a parameter has after a step, "step" apart.
        stock: the class of torch.optim that computes the same, if there is one, with the same options.
        spread: how far a NaN in one gradient gets: its "element", its "tensor", or "all" parameters.
    """

    name: str
    make: Callable[..., Any]
    options: dict[str, Any]
    formula: oracles.Formula
    states: tuple[str, ...]
    stock: type[torch.optim.Optimizer] | None = None
    spread: str = "element"

    def oracle(self, params: Any) -> oracles.Oracle:
        return oracles.Oracle(self.formula, params, self.options)

    def build(self, params: Any, **more: Any) -> Any:
        return self.make(params, **{**self.options, **more})


def _paddle(params: Any, **options: Any) -> RMSProp:
    return RMSProp(parameters=params, **options)


_SGD, _ADAM, _ADAMW = optimizers.NpuFusedSGD, optimizers.NpuFusedAdam, optimizers.NpuFusedAdamW
_LAMB, _RMS = optimizers.NpuFusedLamb, optimizers.NpuFusedRMSpropTF
_MOMENTS = ("exp_avg", "exp_avg_sq")

CASES = [
    Case("sgd", _SGD, dict(lr=0.05), oracles.sgd, (), torch.optim.SGD),
    Case(
        "sgd_momentum",
        _SGD,
        dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
        oracles.sgd,
        ("momentum_buffer",),
        torch.optim.SGD,
    ),
    Case(
        "sgd_nesterov",
        _SGD,
        dict(lr=0.05, momentum=0.9, nesterov=True),
        oracles.sgd,
        ("momentum_buffer",),
        torch.optim.SGD,
    ),
    Case("adam", _ADAM, dict(lr=0.02, weight_decay=0.05), oracles.adam, _MOMENTS, torch.optim.Adam),
    Case(
        "adam_amsgrad",
        _ADAM,
        dict(lr=0.02, betas=(0.8, 0.9), amsgrad=True),
        oracles.adam,
        (*_MOMENTS, "max_exp_avg_sq"),
        torch.optim.Adam,
    ),
    Case("adamw", _ADAMW, dict(lr=0.02, weight_decay=0.1), oracles.adamw, _MOMENTS, torch.optim.AdamW),
    Case("lamb", _LAMB, dict(lr=0.02, weight_decay=0.1), oracles.lamb, _MOMENTS, spread="tensor"),
    Case("lamb_adam", _LAMB, dict(lr=0.02, adam=True), oracles.lamb, _MOMENTS),
    Case("lamb_global", _LAMB, dict(lr=0.02, use_global_grad_norm=True), oracles.lamb, _MOMENTS, spread="all"),
    Case("rmsprop_tf", _RMS, dict(lr=0.02, weight_decay=0.1), oracles.rmsprop_tf, ("square_avg",)),
    Case(
        "rmsprop_tf_momentum",
        _RMS,
        dict(lr=0.02, weight_decay=0.01, momentum=0.9, decoupled_decay=True),
        oracles.rmsprop_tf,
        ("square_avg", "momentum_buffer"),
    ),
    Case(
        "rmsprop_tf_centered",
        _RMS,
        dict(lr=0.02, eps=1e-3, momentum=0.9, centered=True, lr_in_momentum=False),
        oracles.rmsprop_tf,
        ("square_avg", "grad_avg", "momentum_buffer"),
    ),
    Case("lion", optimizers.lion, dict(lr=0.01, weight_decay=0.1), oracles.lion, ("exp_avg",)),
    Case(
        "paddle_rmsprop",
        _paddle,
        dict(learning_rate=0.02, momentum=0.9, centered=True, epsilon=1e-3, weight_decay=0.1),
        oracles.paddle_rmsprop,
        ("square_avg", "grad_avg", "momentum_buffer"),
    ),
]
BY_NAME = {case.name: case for case in CASES}
NPU = [case for case in CASES if case.make in (_SGD, _ADAM, _ADAMW, _LAMB, _RMS)]
# one per optimizer, for tests whose outcome does not depend on the options
ONE_EACH = [BY_NAME[n] for n in ("sgd_momentum", "adam", "adamw", "lamb", "rmsprop_tf_centered", "paddle_rmsprop")]


def over(cases: list[Case], **kwargs: Any) -> pytest.MarkDecorator:
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name, **kwargs)
