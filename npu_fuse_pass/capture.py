"""Stage 1: read an FX graph into updates.

Two forms are read: the graph that Dynamo hands to a backend (in-place and `_foreach_` operations), and functional ATen
graphs that end in `copy_`, as AOTAutograd and `make_fx` give them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .errors import Unsupported
from .interpreter import Cell, Interpreter, Recorded, run_graph
from .ir import Builder, Captured, Expr, Leaf, Output, Slot, Stage, Unfused, Update, postorder


def capture(gm: fx.GraphModule) -> Captured:
    """Read a graph into updates: one per set of written leaves that depend on each other's tensors."""
    interpreter = Interpreter()
    interpreter.grad_enabled = torch.is_grad_enabled()
    attributes: dict[str, Cell] = {}

    def attribute(name: str) -> Cell:
        if name not in attributes:
            tensor = operator.attrgetter(name)(gm)
            leaf = Leaf(
                "attribute", name, dtype=tensor.dtype, shape=tuple(map(int, tensor.shape)), device=tensor.device
            )
            attributes[name] = interpreter.add_leaf(leaf, tensor.ndim > 0)
        return attributes[name]

    try:
        inputs = [_input(interpreter, n, i) for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))]
        returned = run_graph(interpreter, gm.graph, inputs, attribute)
        returned = returned if isinstance(returned, (list, tuple)) else () if returned is None else (returned,)
        outputs = _outputs(interpreter, gm.graph.output_node(), returned)
        unfused = [Unfused(op, reason) for op, reason in interpreter.kept]
        if unfused and all(interpreter.leaves[i].kind == "output" for i in interpreter.written):
            return Captured(interpreter.leaves, [], [])  # nothing is updated: not an optimizer's graph
        updates = _updates(interpreter.leaves, interpreter.written)
        stages = [Stage(_updates(interpreter.leaves, s.writes), s.calls) for s in interpreter.stages]
        return Captured(interpreter.leaves, updates, unfused, returned=outputs, stages=stages)
    except Recorded:
        return Captured(interpreter.leaves, [], [])  # a forward pass: nothing here is an update
    except Unsupported as e:
        # a graph that writes nothing but what it returns is no optimizer's: there is nothing to report
        only_returns = interpreter.written and all(interpreter.leaves[i].kind == "output" for i in interpreter.written)
        return Captured(interpreter.leaves, [], [] if only_returns else [Unfused(e.op, e.reason)])


def _outputs(interpreter: Interpreter, node: fx.Node, returned: Sequence[Any]) -> list[Output]:
    """What the graph returns; values that are no leaf become new tensors that the kernel writes."""
    outputs: list[Output] = []
    sources = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
    for index, (source, cell) in enumerate(zip(sources, returned, strict=False)):
        if not isinstance(cell, Cell):
            outputs.append(Output(literal=cell))
            continue
        meta = source.meta.get("val", source.meta.get("example_value")) if isinstance(source, fx.Node) else None
        number = next((t for t, kinds in _NUMBERS.items() if isinstance(meta, kinds)), None)
        if cell.leaf is None:
            device = next((leaf.device for leaf in interpreter.leaves if leaf.shape), torch.device("cpu"))
            cell.leaf = len(interpreter.leaves)
            leaf = Leaf("output", f"output_{index}", index, dtype=cell.val.dtype, shape=cell.val.shape, device=device)
            interpreter.leaves.append(leaf)
            interpreter.written[cell.leaf] = cell
        outputs.append(Output(cell.leaf, number))
    return outputs


_NUMBERS: dict[type[int] | type[float], tuple[type, ...]] = {int: (int, torch.SymInt), float: (float, torch.SymFloat)}


def _input(interpreter: Interpreter, node: fx.Node, index: int) -> Any:
    example = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(example, (int, float, torch.SymInt, torch.SymFloat)):
        return interpreter.add_leaf(Leaf("input", node.name, index), tensor=False, number=True)
    if not isinstance(example, Tensor):
        raise Unsupported(node.name, f"an argument of the graph is {type(example).__name__}, not a tensor or number")
    leaf = Leaf(
        "input", node.name, index, dtype=example.dtype, shape=tuple(map(int, example.shape)), device=example.device
    )
    return interpreter.add_leaf(leaf, example.ndim > 0)


def _updates(all_leaves: Sequence[Leaf], writes: Mapping[int, Cell]) -> list[Update]:
    """Writes that share a tensor leaf belong to one update."""
    used = {leaf: _leaves_of(cell.val.expr) for leaf, cell in writes.items()}
    parent: dict[int, int] = {}

    def find(x: int) -> int:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    scalar_users: dict[int, set[int]] = {}
    for written, leaves in used.items():
        for leaf in [*leaves, written]:
            if all_leaves[leaf].shape:
                parent[find(leaf)] = find(written)
    for written, leaves in used.items():  # a 0-dim leaf that only one update reads is its own (a step counter)
        for leaf in [*leaves, written]:
            if not all_leaves[leaf].shape:
                scalar_users.setdefault(leaf, set()).add(find(written))
    for _ in scalar_users:  # to the fixed point: an owner may be a 0-dim leaf that finds its own owner later
        before = {leaf: find(leaf) for leaf in scalar_users}
        for leaf, users in scalar_users.items():
            others = {find(u) for u in users} - ({find(leaf)} if leaf in writes else set())
            if len(others) == 1:
                parent[find(leaf)] = find(others.pop())
        if before == {leaf: find(leaf) for leaf in scalar_users}:
            break
    components: dict[int, list[int]] = {}
    for written in used:
        components.setdefault(find(written), []).append(written)
    together = _with_counters(list(components.values()), used)
    return [_update(all_leaves, writes, written) for written in together]


def _with_counters(components: list[list[int]], used: Mapping[int, list[int]]) -> list[list[int]]:
    """Give counters that nothing reads (RMSprop's) to the parameters in whose order they are, one set for each."""

    def counts(component: list[int]) -> bool:
        return all(set(used[leaf]) <= set(component) for leaf in component) and len(component) == 1

    counters = [c for c in components if counts(c)]
    others = [c for c in components if not counts(c)]
    if not others or len(counters) % len(others):
        return components
    for i, counter in enumerate(counters):
        others[i % len(others)].extend(counter)
    return others


def _update(all_leaves: Sequence[Leaf], writes: Mapping[int, Cell], written: list[int]) -> Update:
    """Renumber the leaves of one update to positions in its member."""
    builder = Builder()
    position: dict[int, int] = {}
    made: dict[int, Expr] = {}

    sizes = {all_leaves[leaf].shape for leaf in written} - {()}
    sizes |= {all_leaves[i].shape for w in written for i in _leaves_of(writes[w].val.expr)} - {()}
    if len(sizes) > 1:
        raise Unsupported("write", f"one update reads tensors of shapes {sorted(sizes)}: a sum over several parameters")

    def place(leaf: int) -> int:
        return position.setdefault(leaf, len(position))

    roots = [writes[leaf].val.expr for leaf in written]
    for e in postorder(roots):
        if e.op == "leaf":
            assert isinstance(e.value, int)
            made[id(e)] = builder.make("leaf", (), place(e.value), e.dtype, e.tensor)
        else:
            made[id(e)] = (
                e if not e.args else builder.make(e.op, tuple(made[id(a)] for a in e.args), e.value, e.dtype, e.tensor)
            )
    pairs = [(place(leaf), made[id(root)]) for leaf, root in zip(written, roots, strict=True)]
    leaves = [all_leaves[i] for i in position]
    slots = [Slot(bool(leaf.shape), leaf.dtype if leaf.shape else torch.float64) for leaf in leaves]
    return Update(pairs, [], [tuple(position)], [_label(leaf.name) for leaf in leaves], slots)


def _leaves_of(root: Expr) -> list[int]:
    return [e.value for e in postorder([root]) if e.op == "leaf" and isinstance(e.value, int)]


_KNOWN = "exp_avg_sq max_exp_avg_sq exp_avg_diff exp_avg momentum_buffer square_avg grad_avg acc_delta sum step grad lr"


def _label(name: str) -> str:
    """A readable name from the name that Dynamo gave a leaf."""
    low = name.lower().rstrip("_")
    last = low.split("_")[-1]
    known = next((k for k in _KNOWN.split() if low.endswith(k)), None)
    if known is not None or not low:
        return known or "x"
    if last.isdigit() and "state" in low:
        return f"state{last}"
    if last.isdigit() and low != last:
        return low.removesuffix(f"_{last}")  # AOTAutograd's names: arg3_1
    return "param" if "param" in low else last
