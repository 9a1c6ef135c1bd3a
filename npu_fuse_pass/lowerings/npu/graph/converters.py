"""Converters of the fused nodes: from FX nodes to GE operations, as torchair calls them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from npu_fuse_pass.ir.fused_op import multi_tensor_contribute, multi_tensor_update, parsed
from npu_fuse_pass.ir.types import Formula, group_name
from npu_fuse_pass.lowerings.npu.emit import dedicated, elementwise
from npu_fuse_pass.lowerings.npu.emit import lists as npu_foreach
from npu_fuse_pass.lowerings.npu.emit.list_operations import LISTS
from npu_fuse_pass.lowerings.npu.graph import generated
from npu_fuse_pass.lowerings.npu.graph import names as npu_names
from npu_fuse_pass.lowerings.npu.graph.graph import (
    device_contribute,
    device_dedicated,
    device_lists,
    device_update,
    device_write,
    packed,
)

Make = Callable[..., elementwise.Emitter]
"""Makes an emitter from torchair's GE operations, GE's number of a dtype, the formula, and a node's other arguments."""


def register(torchair: Any) -> None:
    """Give torchair a converter for every node of this package that has none yet."""
    from torchair._ge_concrete_graph import compat_ir

    _name_lists()
    device: dict[Any, Make] = {
        device_update: elementwise.Emitter,
        device_contribute: elementwise.Emitter,
        device_lists: lambda ge, dtypes, made: npu_foreach.Emitter(ge, dtypes, made, compat_ir.ge_op),
        device_dedicated: dedicated.Emitter,
    }
    # as `rewrite` makes them: numbers are float64 and stay so; of a formula's two parts a node computes one
    whole: dict[Any, Make] = {
        multi_tensor_update: functools.partial(_whole, contributions=()),
        multi_tensor_contribute: functools.partial(_whole, writes=()),
    }
    converters: dict[Any, Callable[..., Any]] = {device_write: _convert_write}
    for op, make in device.items():
        converters[op] = npu_names.naming(packed(functools.partial(_convert, make)))
    for op, make in whole.items():
        converters[op] = npu_names.naming(functools.partial(_convert, make), group_name)
    generated.register(torchair)
    for op, converter in converters.items():
        if not hasattr(op, "_ge_converter"):
            torchair.register_fx_node_ge_converter(op)(converter)


def _whole(ge: Any, dtypes: Callable[[torch.dtype], int], made: Formula, **without: Any) -> elementwise.Emitter:
    return elementwise.Emitter(ge, dtypes, dataclasses.replace(made, **without), torch.float64)


def _name_lists() -> None:
    """Add list operations that torchair's module of GE operations lacks (sqrt, reciprocal).

    For a missing operation torchair infers shapes by running the whole fused node on new tensors of the
    arguments' sizes, on their device: memory for a second copy of parameters, gradients and states.
    """
    from torchair._ge_concrete_graph import compat_ir, ge_apis

    for row in LISTS.values():
        if not hasattr(ge_apis, row.name):
            setattr(ge_apis, row.name, functools.partial(compat_ir.ge_op, row.name))


def _convert(make: Make, tensors: list[Any], scalars: list[Any], members: int, formula: str, *own: Any) -> list[Any]:
    """Convert a fused node: the emitter's results for each member, one kind of result after another."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge._ge_graph import torch_type_to_ge_type

    made = parsed(formula)
    elementwise.check(made)
    emitter = make(ge_apis, torch_type_to_ge_type, made, *own)
    shapes = [list(t.symsize) for t in tensors[:members]] or [[]] * members
    rows = emitter.members(list(_slots(made, tensors, scalars, members)), shapes)
    return [row[k] for k in range(len(rows[0])) for row in rows]


def _slots(made: Formula, tensors: list[Any], scalars: list[Any], members: int) -> Iterator[dict[int, Any]]:
    """The values of every member's slots."""
    for m in range(members):
        given = dict(zip(made.tensor_slots, tensors[m::members], strict=True))
        yield given | dict(zip(made.scalar_slots, scalars[m::members], strict=True))


def _convert_write(targets: list[Any], values: list[Any]) -> None:
    """Emit the same as torchair's converter of `copy_`, which becomes outputs in the targets' memory."""
    from torchair._ge_concrete_graph import ge_apis

    for target, value in zip(targets, values, strict=True):
        ge_apis.Assign(target, value).set_meta(target.meta)
