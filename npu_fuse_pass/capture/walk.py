"""Interpret the nodes of an FX graph, one after the other."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.forward import records
from npu_fuse_pass.capture.interpreter import Interpreter
from npu_fuse_pass.capture.originals import Env
from npu_fuse_pass.capture.values import Cell, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import entries, recorded
from npu_fuse_pass.fx_nodes.names import in_order, operation_name
from npu_fuse_pass.fx_nodes.places import source_of
from npu_fuse_pass.reasons import Code

_ARITHMETIC = {f for f in vars(operator).values() if callable(f)} | {math.sqrt, math.pow, max, min, float, int, abs}
_EQUAL = {operator.eq: True, operator.is_: True, operator.ne: False, operator.is_not: False}
_METADATA = {"size", "stride", "dim", "numel", "sym_size", "sym_numel", "is_floating_point", "is_complex"}


def is_known(name: str) -> bool:
    """True if an operation has a row."""
    plain = name.removeprefix("_foreach_").removesuffix("_")
    return plain in ROWS or plain in SHAPED or plain in ("copy", "fill", "zero", "getitem")


def run_graph(
    interpreter: Interpreter, graph: fx.Graph, inputs: Sequence[Any], attribute: Callable[[fx.Node], Any]
) -> Any:
    """Interpret a graph on cells; returns what its output node returns.

    Raises:
        Unsupported: at the first operation that cannot be expressed.
    """
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif operation_name(node) == "_set_grad_enabled":
            interpreter.grad_enabled = bool(node.args[0])
        elif operation_name(node) in ("_enter_autocast", "_exit_autocast"):
            _check_idle(node)
        elif node.op == "get_attr":
            env[node] = attribute(node)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], env.__getitem__)
        else:
            interpreter.node = node
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            try:
                env[node] = _call_node(interpreter, node, args, dict(kwargs), env)
            except Unsupported as e:
                raise e.at(node.name, source_of(node))  # noqa: B904 - it is the same error
    return None


def _check_idle(node: fx.Node) -> None:
    """Refuse the begin of a `with torch.autocast` that changes something; whether it is on already Dynamo guards."""
    if operation_name(node) == "_enter_autocast" and (node.args[2] or torch.is_autocast_enabled(str(node.args[0]))):
        remedy = "take torch.autocast out of the step, and cast where the step needs it"
        error = Unsupported("autocast", "changes the dtypes in which torch computes", Code.OPERATION, remedy)
        raise error.at(node.name, source_of(node))


def _call_node(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], env: Env) -> Any:
    name = operation_name(node)
    if name in interpreter.expansions:
        expanded = interpreter.expansions[name](interpreter, node, args, kwargs)
        if expanded is not NotImplemented:
            return expanded
    if node.target is operator.getitem and not isinstance(args[0], Cell):
        return args[0][args[1]]
    on_numbers = not any(isinstance(a, Cell) for a in entries((args, kwargs)))
    if on_numbers and node.target in _ARITHMETIC:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.target in _EQUAL and None in args:
        return (args[0] is args[1]) == _EQUAL[node.target]
    if interpreter.grad_enabled and records(node):
        raise Unsupported(name, "autograd records it: it is part of a forward pass", Code.FORWARD_PASS)
    if name in _METADATA:
        raise Unsupported(name, "reads the size of a tensor", Code.SIZE)
    if name in ("add", "mul") and all(isinstance(recorded(a), torch.SymBool) for a in node.all_input_nodes):
        args = tuple(_as_integer(interpreter, a) for a in args)
    cells = [cell for cell in entries((args, kwargs)) if isinstance(cell, Cell)]
    for cell in cells:
        cell.read()
    before = [(c, c.val, c.view, c.ahead, c.leaf in interpreter.written) for cell in cells for c in cell.lineage()]
    try:
        result = interpreter.call(name, in_order(node, args), kwargs)
        _verify(node, result, interpreter.keeps)
        return result
    except Unsupported as e:
        if not interpreter.keeps:
            raise
        for cell, val, view, ahead, written in before:  # of a list, some may have been written already
            if cell.leaf is not None and not written:
                interpreter.written.pop(cell.leaf, None)
            cell.val, cell.view, cell.ahead = val, view, ahead
        reason = e.at(node.name, source_of(node)).reason
        return interpreter.originals.keep(node, name, reason, env)


def _as_integer(interpreter: Interpreter, truth: Any) -> Any:
    """A truth value of Python's as an integer, as its sums and products are; those of bool tensors are bool."""
    if not isinstance(truth, Cell):
        return int(truth) if isinstance(truth, bool) else truth
    return Cell(Val(interpreter.builder.cast(truth.val.expr, torch.float64), torch.int64, (), number=True))


def _verify(node: fx.Node, result: Any, scalars: bool) -> None:
    """Check inferred shapes against those that torch has recorded; `scalars`: of 0-dim tensors, too."""
    meta = recorded(node)
    pairs = (
        zip(result, meta, strict=False)
        if isinstance(result, list) and isinstance(meta, (list, tuple))
        else [(result, meta)]
    )
    for cell, fake in pairs:
        if not (isinstance(cell, Cell) and isinstance(fake, Tensor) and (scalars or cell.val.dimmed)):
            continue
        if (tuple(map(int, fake.shape)), fake.dtype) != (cell.val.shape, cell.val.dtype):
            understood = f"understood as {cell.val.dtype} {cell.val.shape}"
            raise Unsupported(operation_name(node), f"gives {fake.dtype} {tuple(fake.shape)}, {understood}", Code.GRAPH)
