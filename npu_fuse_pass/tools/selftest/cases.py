"""The optimizers that the selftest compares: ours with their main options, and torch.optim's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Params = Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer with options.

    Attributes:
        make: parameters -> the optimizer, on any device and in any dtype.
        ours: its numbers and missing gradients change from step to step, which must not recompile; torch's own
            classes recompile then, so theirs stay.
        dtype: of the parameters on the device; the reference is float64.
        quick: also part of `--quick`.
    """

    name: str
    make: Callable[[Params], Any]
    ours: bool = False
    dtype: torch.dtype = torch.float32
    quick: bool = False


def cases(quick: bool) -> list[Case]:
    """All cases, or one for each of our optimizers and torch's most used."""
    return [case for case in (*_ours(), *_stock()) if case.quick or not quick]


def _ours() -> list[Case]:
    import optimizers
    from optimizers.paddle import RMSProp

    def row(name: str, cls: Any, quick: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
        return Case(name, lambda params: cls(params, **options), True, dtype, quick)

    def paddle(params: Params, **options: Any) -> Any:
        return RMSProp(parameters=params, **options)

    sgd, adam, adamw = optimizers.NpuFusedSGD, optimizers.NpuFusedAdam, optimizers.NpuFusedAdamW
    lamb, rms = optimizers.NpuFusedLamb, optimizers.NpuFusedRMSpropTF
    f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    return [
        row("NpuFusedSGD", sgd, lr=0.05),
        row("NpuFusedSGD, momentum", sgd, True, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
        row("NpuFusedSGD, Nesterov", sgd, lr=0.05, momentum=0.9, nesterov=True),
        row("NpuFusedAdam", adam, True, lr=0.02, weight_decay=0.05),
        row("NpuFusedAdam, amsgrad", adam, lr=0.02, amsgrad=True),
        row("NpuFusedAdam, float16 parameters", adam, dtype=f16, lr=0.02, state_dtype=f32),
        row("NpuFusedAdamW", adamw, True, lr=0.02, weight_decay=0.1),
        row("NpuFusedAdamW, amsgrad", adamw, lr=0.02, weight_decay=0.1, amsgrad=True),
        row("NpuFusedAdamW, bfloat16 parameters", adamw, dtype=bf16, lr=0.02, state_dtype=f32),
        row("NpuFusedLamb", lamb, True, lr=0.02, weight_decay=0.1),
        row("NpuFusedLamb, adam", lamb, lr=0.02, adam=True),
        row("NpuFusedLamb, global norm", lamb, lr=0.02, use_global_grad_norm=True),
        row("NpuFusedRMSpropTF", rms, lr=0.02, weight_decay=0.1),
        row("NpuFusedRMSpropTF, momentum", rms, True, lr=0.02, momentum=0.9, decoupled_decay=True, weight_decay=0.01),
        row("NpuFusedRMSpropTF, centered", rms, lr=0.02, eps=1e-3, momentum=0.9, centered=True, lr_in_momentum=False),
        row("lion", optimizers.lion, True, lr=0.01, weight_decay=0.1),
        row("paddle RMSProp", paddle, True, learning_rate=0.02, momentum=0.9, centered=True, epsilon=1e-3),
    ]


def _stock() -> list[Case]:
    def row(name: str, quick: bool = False, **options: Any) -> Case:
        label = ", ".join([f"torch.optim.{name}", *(f"{k}={v}" for k, v in options.items() if k != "lr")])
        forms = {"foreach": True, **options}
        return Case(label, lambda params: getattr(torch.optim, name)(params, **forms), quick=quick)

    return [
        row("Adam", True, lr=0.02),
        row("Adam", lr=0.02, foreach=False),
        row("Adam", lr=0.02, weight_decay=0.1, amsgrad=True),
        row("AdamW", True, lr=0.02),
        row("SGD", lr=0.05),
        row("SGD", True, lr=0.05, momentum=0.9),
        row("SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        row("RMSprop", True, lr=0.02),
        row("RMSprop", lr=0.02, momentum=0.9, centered=True, eps=1e-3),
        row("Adagrad", lr=0.02),
        row("Adadelta", lr=0.5),
        row("Adamax", lr=0.02),
        row("NAdam", lr=0.02),
        row("RAdam", lr=0.02),
        row("Rprop", lr=0.02),
        row("ASGD", lr=0.02),
    ]
