"""Fused kernels with original operations between them (the matrix products of Muon, for example)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from npu_fuse_pass.ir.types import Call, LeafRef


class _Program(Protocol):
    def __call__(self, values: list[Tensor | None], complete: bool = False, kinds: object = None) -> None: ...


class Program:
    """Stages in turn: kernels that make temporaries, the operations that read them; at last the kernels that write."""

    def __init__(self, stages: Sequence[tuple[_Program, Sequence[Call]]], last: _Program) -> None:
        self._stages = [(program, [(call, _function(call)) for call in calls]) for program, calls in stages]
        self._last = last

    def __call__(self, values: list[Tensor | None], complete: bool = False, kinds: object = None) -> None:
        """Run the step on the values of all leaves; nothing is written before the last kernels."""
        for program, calls in self._stages:
            program(values, complete)
            with torch.no_grad():
                for call, function in calls:
                    self._run(call, function, values)
        self._last(values, complete)

    def _run(self, call: Call, function: Callable[..., Any], values: list[Any]) -> None:
        def value(ref: LeafRef) -> Any:
            return float(values[ref.index]) if ref.number else values[ref.index]

        args, kwargs = tree_map_only(LeafRef, value, (call.args, call.kwargs))
        made = function(*args, **kwargs)
        for index, tensor in zip(call.results, made if call.several else [made], strict=True):
            values[index] = tensor


def _function(call: Call) -> Callable[..., Any]:
    if isinstance(call.target, str):
        name = call.target
        return lambda self, *args, **kwargs: operator.attrgetter(name)(self)(*args, **kwargs)
    return call.target
