"""Converters of the fused nodes: from FX nodes to GE operations, as torchair calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ir import Formula, group_name
from ..ops import multi_tensor_contribute, multi_tensor_update, parsed
from . import npu_emit, npu_foreach, npu_names, npu_operands
from .npu_graph import device_contribute, device_dedicated, device_lists, device_update
from .npu_lists import LISTS


def register(torchair: Any) -> None:
    """Give torchair a converter for every fused node that has none yet."""
    converters: dict[Any, Callable[..., list[Any]]] = {
        device_update: functools.partial(_convert_device, False),
        device_contribute: functools.partial(_convert_device, True),
        device_dedicated: _convert_dedicated,
        device_lists: _convert_lists,
        multi_tensor_update: functools.partial(_convert_whole, False),
        multi_tensor_contribute: functools.partial(_convert_whole, True),
    }
    from torchair.ge._ge_graph import get_default_ge_graph

    _name_lists()
    whole = (multi_tensor_update, multi_tensor_contribute)
    for op, converter in converters.items():
        if not hasattr(op, "_ge_converter"):
            named = npu_names.naming(converter, get_default_ge_graph, group_name if op in whole else None)
            torchair.register_fx_node_ge_converter(op)(named)


def _name_lists() -> None:
    """Put operations on lists that torchair's module of GE operations lacks (sqrt, reciprocal) into it.

    For an operation that is not there torchair infers shapes by running the whole fused node on new tensors of the
    arguments' sizes, on their device: memory for a second copy of parameters, gradients and states.
    """
    from torchair._ge_concrete_graph import compat_ir, ge_apis

    for row in LISTS.values():
        if not hasattr(ge_apis, row.name):
            setattr(ge_apis, row.name, functools.partial(compat_ir.ge_op, row.name))


def _convert_device(
    contribute: bool,
    tensors: list[Any],
    numbers: list[Any],
    totals: list[Any],
    positions: list[int],
    members: int,
    formula: str,
    meta_outputs: Any = None,
) -> list[Any]:
    """`npu_fused::device_update` and `device_contribute`: numbers are float32, or float64 in a float64 group."""
    scalars = [*(numbers[p] for p in positions), *totals]
    return _convert(contribute, tensors, scalars, members, formula, npu_emit.wide_dtype(parsed(formula)))


def _convert_whole(
    contribute: bool, tensors: list[Any], scalars: list[Any], members: int, formula: str, meta_outputs: Any = None
) -> list[Any]:
    """`npu_fused::multi_tensor_update` and `_contribute`, as `rewrite` makes them: numbers are float64 and stay so."""
    return _convert(contribute, tensors, scalars, members, formula, torch.float64)


def _convert_lists(
    tensors: list[Any],
    numbers: list[Any],
    totals: list[Any],
    positions: list[int],
    members: int,
    formula: str,
    meta_outputs: Any = None,
) -> list[Any]:
    """`npu_fused::device_lists`."""
    from torchair._ge_concrete_graph import compat_ir, ge_apis
    from torchair.ge._ge_graph import torch_type_to_ge_type

    made = parsed(formula)
    npu_emit.check(made)
    emitter = npu_foreach.Emitter(ge_apis, torch_type_to_ge_type, made, compat_ir.ge_op)
    given = list(_slots(made, tensors, [*(numbers[p] for p in positions), *totals], members))
    results = emitter.members(given, [list(t.symsize) for t in tensors[:members]])
    return [row[k] for k in range(len(results[0])) for row in results]


def _convert_dedicated(
    tensors: list[Any],
    numbers: list[Any],
    totals: list[Any],
    positions: list[int],
    members: int,
    formula: str,
    call: str,
    written: list[int],
    meta_outputs: Any = None,
) -> list[Any]:
    """`npu_fused::device_dedicated`."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge._ge_graph import torch_type_to_ge_type

    made = parsed(formula)
    npu_emit.check(made)
    emitter = npu_operands.Emitter(ge_apis, torch_type_to_ge_type, made, call, written)
    return _members(emitter, made, tensors, [*(numbers[p] for p in positions), *totals], members)


def _convert(
    contribute: bool, tensors: list[Any], scalars: list[Any], members: int, formula: str, numbers: torch.dtype
) -> list[Any]:
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge._ge_graph import torch_type_to_ge_type

    made = parsed(formula)
    npu_emit.check(made)
    emitter = npu_emit.Emitter(ge_apis, torch_type_to_ge_type, made, contribute, numbers)
    return _members(emitter, made, tensors, scalars, members)


def _members(
    emitter: npu_emit.Emitter | npu_operands.Emitter,
    made: Formula,
    tensors: list[Any],
    scalars: list[Any],
    members: int,
) -> list[Any]:
    results = [
        emitter.member(given, list(tensors[m].symsize) if tensors else [])
        for m, given in enumerate(_slots(made, tensors, scalars, members))
    ]
    return [row[k] for k in range(len(results[0])) for row in results]


def _slots(made: Formula, tensors: list[Any], scalars: list[Any], members: int) -> Iterator[dict[int, Any]]:
    """For every member what its slots hold."""
    for m in range(members):
        given = dict(zip(made.tensor_slots, tensors[m::members], strict=True))
        yield given | dict(zip(made.scalar_slots, scalars[m::members], strict=True))
