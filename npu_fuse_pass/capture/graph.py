"""Stage 1: read an FX graph into updates.

Two forms are read: the graph that Dynamo hands to a backend (in-place and `_foreach_` operations), and functional ATen
graphs that end in `copy_`, as AOTAutograd and `make_fx` give them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.forward import is_forward_pass
from npu_fuse_pass.capture.inline import expand_rule
from npu_fuse_pass.capture.interpreter import Interpreter
from npu_fuse_pass.capture.list_ops import LISTS
from npu_fuse_pass.capture.numbers import is_number
from npu_fuse_pass.capture.originals import dense_strides, number_type
from npu_fuse_pass.capture.shards import of_this_process
from npu_fuse_pass.capture.updates import updates_of
from npu_fuse_pass.capture.values import Cell, Val
from npu_fuse_pass.capture.walk import run_graph
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import recorded, storage_of, writes_leaves
from npu_fuse_pass.fx_nodes.names import operation_name
from npu_fuse_pass.fx_nodes.places import source_of
from npu_fuse_pass.ir.types import Captured, Leaf, Output, Segment
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.tensors.sharded import is_dtensor

Kind = Literal["input", "attribute"]


def capture(gm: fx.GraphModule, numbers: bool = False, dimensions: bool = False) -> Captured:
    """Read a graph into updates: one per set of written leaves that depend on each other's tensors.

    DTensors are read as what this process holds of them.

    Args:
        numbers: tensors of one element that are used as numbers are read as numbers.
        dimensions: kernels also compute reductions over some of the dimensions and broadcasts, which the lowering has
            to support (`ir.dimensions`); otherwise they stay as they are.
    """
    captured = _read(gm, numbers, dimensions)
    if any(map(is_dtensor, _tensors(gm, captured).values())):
        captured = _read(gm, numbers) if dimensions else captured
        return of_this_process(captured, {i: t for i, t in _tensors(gm, captured).items() if is_dtensor(t)})
    plain = (numbers, False, False)
    for way in dict.fromkeys([*_ways_apart(captured, dimensions), plain]):
        if captured.updates or not captured.unfused:
            break
        if way == (numbers, dimensions, False):
            continue
        found = _read(gm, *way)
        captured = found if found.updates or not found.unfused or way == plain else captured
    return captured


def _ways_apart(captured: Captured, dimensions: bool) -> list[tuple[bool, bool, bool]]:
    """How to read a graph in which tensors of different shapes meet, so that they do not: arguments of `_read`.

    Tensors of one element are tensors among others; reductions of all elements stay as they are.
    """
    if [reason.code for reason in captured.unfused] != [Code.ACROSS_PARAMETERS]:
        return []
    return [(False, dimensions, False), (False, dimensions, True), (False, False, True)]


def _tensors(gm: fx.GraphModule, captured: Captured) -> dict[int, Any]:
    """The recorded tensors of the leaves that the graph is given or holds, by index."""
    examples = [recorded(n) for n in gm.graph.find_nodes(op="placeholder")]
    given = [(i, leaf) for i, leaf in enumerate(captured.leaves) if leaf.optimizer is None]
    tensors = {i: examples[leaf.index] for i, leaf in given if leaf.kind == "input"}
    tensors |= {i: operator.attrgetter(leaf.name)(gm) for i, leaf in given if leaf.kind == "attribute"}
    return tensors


def _read(gm: fx.GraphModule, numbers: bool, dimensions: bool = False, reductions_stay: bool = False) -> Captured:
    interpreter = Interpreter({**LISTS, "rule_update": expand_rule}, dimensions=dimensions)
    interpreter.numbers = numbers
    interpreter.reductions_stay = reductions_stay
    interpreter.grad_enabled = torch.is_grad_enabled()
    attributes: dict[str, Cell] = {}

    def attribute(node: fx.Node) -> Cell:
        name = str(node.target)
        if name not in attributes:
            attributes[name] = _tensor(interpreter, node, operator.attrgetter(name)(gm), "attribute", name)
        return attributes[name]

    try:
        inputs = [_input(interpreter, n, i) for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))]
        returned = run_graph(interpreter, gm.graph, inputs, attribute)
        returned = returned if isinstance(returned, (list, tuple)) else () if returned is None else (returned,)
        outputs = _outputs(interpreter, gm.graph.output_node(), returned)
        for cell in interpreter.written.values():
            cell.read()
        unfused = list(interpreter.originals.reasons.values())
        _check_copies(interpreter, unfused)
        stores = _stores(interpreter)
        interpreter.originals.read_apart(interpreter.written)
        written = [*interpreter.written, *(leaf for leaf, _ in stores if interpreter.leaves[leaf].dtype.is_complex)]
        if unfused and all(interpreter.leaves[i].kind == "output" for i in written):
            return Captured(interpreter.leaves, [], [])  # nothing is updated: not an optimizer's graph
        b, totals = interpreter.builder, 0
        segments = []
        for s in interpreter.originals.levels:
            made, totals = updates_of(interpreter.leaves, s.writes, b, totals, dimensions)
            segments.append(Segment(made, s.calls))
        updates, _ = updates_of(interpreter.leaves, interpreter.written, b, totals, dimensions)
        return Captured(
            interpreter.leaves,
            updates,
            unfused,
            segments,
            outputs,
            moved=interpreter.moved,
            moved_by_calls=interpreter.moved_by_calls + interpreter.copied,
            expanded=interpreter.expanded,
            stores=stores,
            put_right=b.put_right,
        )
    except Unsupported as e:
        forward = is_forward_pass(gm.graph)
        reason = Code.FORWARD_PASS(_BESIDE_A_FORWARD_PASS, "forward pass") if forward else e.reason
        return Captured(interpreter.leaves, [], [reason] if writes_leaves(gm.graph, of_parameters=forward) else [])


_BESIDE_A_FORWARD_PASS = "autograd records operations of the graph that updates parameters"
_SAVED = 4
"""Copies may move so many times less than operations that become kernels, which move half of it to an eighth."""


def _check_copies(interpreter: Interpreter, unfused: Sequence[Reason]) -> None:
    """Refuse a step whose writes through views take copies that may cost more than kernels save.

    Raises:
        Unsupported: names the first such write.
    """
    by_operations = interpreter.moved - interpreter.moved_by_calls
    reason = next((r for r in unfused if r.code is Code.VIEW_WRITTEN), None)
    if reason is not None and _SAVED * interpreter.copied > by_operations:
        text = f"{reason.text}, where copies cost more than kernels save"
        raise Unsupported.of(dataclasses.replace(reason, text=text))


def _stores(interpreter: Interpreter) -> list[tuple[int, int]]:
    """Remove writes to leaves of dtypes that kernels do not have. Returns them with the leaves they copy."""
    stores, originals = [], interpreter.originals
    written = set(interpreter.written)
    for leaf, cell in list(interpreter.written.items()):
        kept = _kept(interpreter, cell.val)
        if kept is not None:
            changed = originals.memory_of(kept) in written and kept != leaf
            stores.append((leaf, originals.copied(cell.val) if changed else kept))
            del interpreter.written[leaf]
    return stores


def _kept(interpreter: Interpreter, val: Val) -> int | None:
    """The leaf that holds a value which a kernel would not keep exactly (an integer, for example)."""
    if val.expr.op != "leaf" or val.number or val.dtype.is_floating_point or (val.dimmed and not val.opaque):
        return None
    assert isinstance(val.expr.value, int)
    return val.expr.value if interpreter.leaves[val.expr.value].dtype == val.dtype else None


def _outputs(interpreter: Interpreter, node: fx.Node, returned: Sequence[Any]) -> list[Output]:
    """The graph's results; values that are not leaves become new tensors that the kernel writes.

    Raises:
        Unsupported: one shares memory with something else, or lies in it as no new tensor would.
    """
    outputs: list[Output] = []
    made: dict[int, _Returned] = {}  # by memory
    places: dict[int, int | None] = {}  # the memory of leaves in whose memory a result lies
    given = {storage_of(recorded(n)) for n in node.graph.nodes if n.op in ("placeholder", "get_attr")} - {None}
    sources = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
    for index, (source, cell) in enumerate(zip(sources, returned, strict=False)):
        if not isinstance(cell, Cell):
            outputs.append(Output(literal=cell))
            continue
        meta = recorded(source)
        number = number_type(meta)
        if cell.leaf is None:
            value, memory = cell.read(), storage_of(meta)
            kept = _kept(interpreter, value)
            place = None if kept is None else interpreter.originals.memory_of(kept)
            if place is not None and not value.opaque:  # a copy of a number is read as that number
                own = interpreter.leaves[place].kind in ("input", "attribute")
                if memory not in given if own else places.setdefault(place, memory) != memory:
                    place = kept = interpreter.originals.copied(value)
            shared = memory is not None and made.setdefault(memory, _Returned()).shares(cell, place, meta)
            if memory in given:
                shared = place is None or place != cell.lineage()[-1].leaf or place in interpreter.written
            if shared:
                raise _not_new(source, "shares memory with another tensor")
            if kept is not None:
                outputs.append(Output(kept))
                continue
            if value.shape and dense_strides(meta) is None:
                raise _not_new(source, "has gaps in memory, or elements at one place")
            device = next((leaf.device for leaf in interpreter.leaves if leaf.shape), torch.device("cpu"))
            cell.leaf = len(interpreter.leaves)
            strides = dense_strides(meta) if cell.val.shape else None
            name, dtype, shape = f"output_{index}", value.dtype, value.shape
            leaf = Leaf("output", name, index, dtype=dtype, shape=shape, device=device, strides=strides)
            interpreter.leaves.append(leaf)
            interpreter.written[cell.leaf] = cell
        outputs.append(Output(cell.leaf, number, detached=_is_detached(source)))
    return outputs


class _Returned:
    """What a graph returns of one memory: by where a single element lies, which no other one overlaps, or None."""

    def __init__(self) -> None:
        self._by_element: dict[int | None, list[tuple[Cell, int | None]]] = {}

    def shares(self, cell: Cell, place: int | None, fake: Tensor) -> bool:
        """Add a tensor; True if it shares memory with one before, and will not lie in the same leaf's, its place."""
        element = int(fake.storage_offset()) if fake.numel() == 1 else None
        near = self._by_element if element is None else self._by_element.keys() & {element, None}
        before = [pair for e in near for pair in self._by_element[e]]
        self._by_element.setdefault(element, []).append((cell, place))
        return any(other is not cell and (place is None or place != other_place) for other, other_place in before)


def _not_new(source: fx.Node, why: str) -> Unsupported:
    return Unsupported("output", f"{source.name}, which the graph returns, {why}", Code.VIEW_RETURNED).at(
        source.name, source_of(source)
    )


def _is_detached(node: fx.Node) -> bool:
    """True if what a node returns is another tensor object over the memory of an argument of the graph."""
    while node.op not in ("placeholder", "get_attr") and node.args and isinstance(node.args[0], fx.Node):
        if operation_name(node) in ("detach", "alias", "_get_data_attr"):
            return True
        node = node.args[0]
    return False


def _input(interpreter: Interpreter, node: fx.Node, index: int) -> Any:
    example = recorded(node)
    if isinstance(example, (int, float, torch.SymInt, torch.SymFloat)):
        number = torch.int64 if isinstance(example, (int, torch.SymInt)) else torch.float64
        return interpreter.add_leaf(Leaf("input", node.name, index), tensor=False, number=number)
    if not isinstance(example, Tensor):
        raise Unsupported(
            node.name, f"an argument of the graph is {type(example).__name__}, not a tensor or number", Code.GRAPH
        )
    return _tensor(interpreter, node, example, "input", node.name, index)


def _tensor(interpreter: Interpreter, node: fx.Node, value: Tensor, kind: Kind, name: str, index: int = -1) -> Cell:
    shape = tuple(map(int, value.shape))
    strides = tuple(map(int, value.stride())) if value.layout is torch.strided else None
    leaf = Leaf(kind, name, index, dtype=value.dtype, shape=shape, device=value.device, strides=strides)
    if interpreter.numbers and is_number(node, value):
        return interpreter.add_leaf(dataclasses.replace(leaf, shape=(), held=shape), tensor=False)
    return interpreter.add_leaf(leaf, value.ndim > 0)
