"""Fused kernels with original operations between them (the matrix products of Muon, for example)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.fx_nodes.effects import called
from npu_fuse_pass.ir.types import Call, LeafRef, LeafValues
from npu_fuse_pass.lowerings import program
from npu_fuse_pass.lowerings.interrupts import again


class Program:
    """Segments in turn: kernels that make temporaries, the operations that read them; at last the kernels that write.

    Args:
        segments: kernels, if any, and the operations after them.
        last: the kernels that write.
        stores: leaves that get the values of other leaves then.
    """

    written = False  # not read of a program of several segments

    def __init__(
        self,
        segments: Sequence[tuple[program.Program | None, Sequence[Call]]],
        last: program.Program,
        stores: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._segments = [(kernels, [_Operation(call) for call in calls]) for kernels, calls in segments]
        self._generators = Generators([call for _, calls in segments for call in calls])
        self._last = last
        self._stores = stores

    @property
    def begun(self) -> bool:
        """As of the last kernels: nothing is written before."""
        return self._last.begun

    @begun.setter
    def begun(self, value: bool) -> None:
        self._last.begun = value

    @torch.no_grad()
    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None:
        """Run the step on the values of all leaves; nothing is written before the last kernels.

        Raises:
            Mismatch: nothing was changed.

        Whatever is raised before the last kernels, the random numbers that were drawn are in the generators again.
        """
        restore_generators = self._generators.save()
        self._last.written = False
        try:
            for kernels, operations in self._segments:
                if kernels is not None:
                    kernels(values, complete)
                for operation in operations:
                    operation(values)
            self._last(values, complete)
            self._last.begun = self._last.written = True
            self._store(values)
        except BaseException:
            if self._last.written:
                again(lambda: self._store(values))
            else:
                restore_generators()
            raise

    def _store(self, values: LeafValues) -> None:
        for leaf, result in self._stores:
            values[leaf].copy_(values[result])  # type: ignore[union-attr,arg-type]


_HOLDING = (LeafRef, list, tuple, dict, slice)  # arguments that are leaves' values, or may hold some


class _Operation:
    """A call of an original operation, with what does not change between steps."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._args = list(call.args)
        self._tensors = [(k, a.index) for k, a in enumerate(call.args) if isinstance(a, LeafRef) and a.number is None]
        tensors = {k for k, _ in self._tensors}
        self._others = [k for k, a in enumerate(call.args) if k not in tensors and isinstance(a, _HOLDING)]

    def __call__(self, values: list[Any]) -> None:
        call, args = self.call, self._args.copy()
        for source, holder in call.copies:
            values[holder] = _copy(values[source])
        for k, i in self._tensors:
            args[k] = values[i]
        for k in self._others:
            args[k] = _filled(args[k], values)
        kwargs = _filled(call.kwargs, values) if call.kwargs else {}
        made = called(call.target, args, kwargs)
        if call.number:
            made = torch.tensor(made, dtype=torch.float64, device="cpu")
        for index, tensor in zip(call.results, made if call.several else [made], strict=bool(call.results)):
            values[index] = tensor
        for holder, result in call.written:
            values[result] = values[holder]


def _copy(t: Tensor) -> Tensor:
    """In memory as the original: what random operations draw depends on it."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _filled(value: Any, values: Sequence[Any]) -> Any:
    """An argument with the leaves' values in it."""

    def filled(x: Any) -> Any:
        if not isinstance(x, LeafRef):
            return x
        return values[x.index] if x.number is None else _number(values[x.index], x.number)

    return fx.node.map_aggregate(value, filled)


def _number(t: Tensor, kind: Callable[[Any], Any]) -> Any:
    return round(float(t)) if kind is int else kind(t)


class Generators:
    """The generators from which original operations may draw.

    Args:
        calls: the operations; those of the CPU and those that calls are given.
        devices: theirs as well.
    """

    def __init__(self, calls: Sequence[Call], devices: Iterable[torch.device] = ()) -> None:
        given = [v for call in calls for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Generator)]
        self._generators = [torch.default_generator, *given] if calls else []
        self._devices = [(torch.get_device_module(d), d) for d in devices if calls and d.type != "cpu"]

    def save(self) -> Callable[[], None]:
        """Note what they hold now; returns what puts it back."""
        states = [(g, g.get_state()) for g in self._generators]
        of_devices = [(module, d, module.get_rng_state(d)) for module, d in self._devices]

        def restore() -> None:
            for generator, state in states:
                generator.set_state(state)
            for module, device, state in of_devices:
                module.set_rng_state(state, device)

        return restore
