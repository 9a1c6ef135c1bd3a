"""A reference interpreter for GE graphs: what the graph computes, on the CPU, one torch call per GE operation.

It proves the algebra and the types of a graph. It says nothing about an NPU's rounding, its dtype support or its
memory. It is strict, because GE is: operands of one operation have one dtype, shapes must broadcast, a value that is
written back has exactly the shape and dtype of its target.

Semantics follow the CANN operator prototypes (opp/built-in/op_proto/inc/*.h of the toolkit, the "Operator
Specifications" of Atlas A2); the same signatures are the REG_OP docstrings of torchair's
_ge_concrete_graph/auto_generated_ge_raw_ops.py. A line of the tables that follow says where more was needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kernels
import signatures
import torch
from torch import Tensor

DTYPES = {
    "DT_FLOAT": torch.float32, "DT_FLOAT16": torch.float16, "DT_BF16": torch.bfloat16, "DT_DOUBLE": torch.float64,
    "DT_INT8": torch.int8, "DT_UINT8": torch.uint8, "DT_INT16": torch.int16, "DT_INT32": torch.int32,
    "DT_INT64": torch.int64, "DT_BOOL": torch.bool,
}  # fmt: skip


class GeError(Exception):
    """The graph is not one that GE would take, or the interpreter does not know an operation."""


def proto_dtype(number: int) -> torch.dtype:
    """The dtype of a tensor description (the numbering of the protocol buffer)."""
    from torchair._ge_concrete_graph import ge_ir_pb2

    return DTYPES[ge_ir_pb2.DataType.Name(number)]


def ge_dtype(number: int) -> torch.dtype:
    """The dtype in an attribute such as Cast's dst_type (GE's own numbering, which differs)."""
    from torchair.ge import DataType

    return next(DTYPES[name] for name, value in vars(DataType).items() if name in DTYPES and value == number)


@dataclass(frozen=True)
class Node:
    """One operation with its inputs' values; attributes are read by their kind (i, f, b, list.i)."""

    op: Any
    inputs: Sequence[Tensor | None]

    def tensors(self) -> list[Tensor]:
        """Every input; an absent one is an error."""
        given = [value for value in self.inputs if value is not None]
        if len(given) != len(self.inputs):
            raise GeError("a required input is absent")
        return given

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self._attribute(name, default, lambda attr: attr.i))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._attribute(name, default, lambda attr: attr.f))

    def flag(self, name: str, default: bool | None = None) -> bool:
        return bool(self._attribute(name, default, lambda attr: attr.b))

    def integers(self, name: str, default: list[int] | None = None) -> list[int]:
        return [int(i) for i in self._attribute(name, default, lambda attr: attr.list.i)]

    def _attribute(self, name: str, default: Any, read: Callable[[Any], Any]) -> Any:
        if name in self.op.attr:
            return read(self.op.attr[name])
        if default is None:
            raise GeError(f"attribute {name!r} is required")
        return default


def constant(op: Any) -> Tensor:
    value = op.attr["value"].t
    raw = (
        torch.frombuffer(bytearray(value.data), dtype=torch.uint8) if value.data else torch.empty(0, dtype=torch.uint8)
    )
    return raw.view(proto_dtype(value.desc.dtype)).reshape(list(value.desc.shape.dim))


def check_input(op: Any, value: Tensor) -> None:
    """An input must be what the Data operation declares (-1: any size)."""
    description = op.output_desc[0]
    declared = list(description.shape.dim)
    fits = len(declared) == value.dim() and all(d in (-1, s) for d, s in zip(declared, value.shape, strict=True))
    if not fits or proto_dtype(description.dtype) != value.dtype:
        raise GeError(
            f"{op.name}: declared {proto_dtype(description.dtype)} {declared}, got {value.dtype} {list(value.shape)}"
        )
    if not value.is_contiguous():
        raise GeError(f"{op.name}: an input of GE must be contiguous")


def check_dtypes(op: Any, values: Sequence[Tensor | None]) -> None:
    """The operands' dtypes must be among those that the operation's prototype lists."""
    allowed = signatures.inputs_of(op.type)
    if len(allowed) != len(values):
        return  # a list of tensors
    for position, (listed, value) in enumerate(zip(allowed, values, strict=True)):
        if listed is not None and value is not None and not any(DTYPES.get(name) == value.dtype for name in listed):
            raise GeError(f"input {position} is {value.dtype}; the prototype lists {sorted(listed)}")


def evaluate(graph: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The values of NetOutput."""
    values: dict[str, Tensor] = {}
    for op in graph.op:
        # "name:-1" is a control edge, "" an optional input that is absent.
        names = [name for name in op.input if not name.endswith(":-1")]
        unknown = [name for name in names if name and name not in values]
        if op.type not in ("Data", "RefData") and unknown:
            raise GeError(f"{op.name} ({op.type}): {unknown} come later or never")
        if op.type == "NetOutput":
            return [values[name] for name in names]
        outputs: Sequence[Tensor]
        if op.type in ("Data", "RefData"):
            outputs = [inputs[op.attr["index"].i]]
            check_input(op, outputs[0])
        elif op.type == "Const":
            outputs = [constant(op)]
        elif op.type in kernels.KERNELS:
            given = [values[name] if name else None for name in names]
            try:
                check_dtypes(op, given)
                outputs = kernels.KERNELS[op.type](Node(op, given))
            except (GeError, RuntimeError, IndexError, ValueError) as error:
                raise GeError(f"{op.name} ({op.type}): {error}") from error
        else:
            raise GeError(f"{op.name}: no semantics for {op.type}")
        if len(outputs) != len(op.output_desc):
            raise GeError(f"{op.name} ({op.type}): {len(outputs)} outputs, {len(op.output_desc)} declared")
        values.update({f"{op.name}:{index}": output for index, output in enumerate(outputs)})
    raise GeError("the graph has no NetOutput")


def run(graph: Any, inputs: Sequence[Tensor], assigned_outputs: Sequence[Tensor | None] = ()) -> list[Tensor]:
    """What TorchNpuGraph.run does: outputs with an assigned tensor are written into it, all at the end."""
    outputs = evaluate(graph, inputs)
    declared = [ge_dtype(number) for number in graph.attr["_output_dtypes"].list.i]
    if declared != [output.dtype for output in outputs]:
        raise GeError(f"outputs are {[output.dtype for output in outputs]}, torchair told GE {declared}")
    targets = list(assigned_outputs) or [None] * len(outputs)
    # A copy first: an output can be an input, and writes must not be seen by other outputs.
    outputs = [output.clone() for output in outputs]
    for index, target in enumerate(targets):
        if target is None:
            continue
        if target.shape != outputs[index].shape or target.dtype != outputs[index].dtype:
            raise GeError(f"output {index} is {outputs[index].dtype} {list(outputs[index].shape)}, "
                          f"its target {target.dtype} {list(target.shape)}")  # fmt: skip
        target.copy_(outputs[index])
        outputs[index] = target
    return outputs
