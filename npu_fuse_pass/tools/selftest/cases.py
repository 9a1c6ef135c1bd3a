"""The optimizers that the selftest compares: this package's with their main options, and torch.optim's."""

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
        ours: its numbers and missing gradients change from step to step, which must not recompile. torch's classes
            recompile then, so theirs do not change.
        dtype: of the parameters on the device; the reference is float64.
        quick: also part of `--quick`.
    """

    name: str
    make: Callable[[Params], Any]
    ours: bool = False
    dtype: torch.dtype = torch.float32
    quick: bool = False


def cases(quick: bool) -> list[Case]:
    """All cases; with `quick` one for each of this package's optimizers and for torch's most used."""
    return [case for case in (*_ours(), *_stock()) if case.quick or not quick]


def _ours() -> list[Case]:
    """Every row of the optimizers' table; the first one of each optimizer also for `--quick` and in half precision."""
    import optimizers

    def case(row: Any, quick: bool = False, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
        name = row.label if dtype is torch.float32 else f"{row.label}, {str(dtype).rpartition('.')[2]} parameters"
        return Case(name, lambda params: row.build(params, **more), True, dtype, quick)

    first = optimizers.one_each(optimizers.ROWS)
    half = [case(row, dtype=d, state_dtype=torch.float32) for row in first for d in (torch.float16, torch.bfloat16)]
    return [*(case(row, quick=row in first) for row in optimizers.ROWS), *half]


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
