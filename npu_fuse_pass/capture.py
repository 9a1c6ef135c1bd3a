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

from .capture_totals import Contribution, separate
from .cells import Cell
from .errors import Unsupported
from .inline import expand_rule
from .interpreter import Interpreter, Recorded, run_graph
from .ir import Builder, Captured, Expr, Leaf, Output, Slot, Stage, Unfused, Update, postorder


def capture(gm: fx.GraphModule) -> Captured:
    """Read a graph into updates: one per set of written leaves that depend on each other's tensors."""
    interpreter = Interpreter()
    interpreter.grad_enabled = torch.is_grad_enabled()
    interpreter.expansions["rule_update"] = expand_rule
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
        b, totals = interpreter.builder, 0
        stages = []
        for s in interpreter.stages:
            made, totals = _updates(interpreter.leaves, s.writes, b, totals)
            stages.append(Stage(made, s.calls))
        updates, totals = _updates(interpreter.leaves, interpreter.written, b, totals)
        moved = (interpreter.moved, interpreter.moved_by_calls)
        return Captured(interpreter.leaves, updates, unfused, totals, stages, outputs, *moved)
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


def _updates(
    all_leaves: Sequence[Leaf], cells: Mapping[int, Cell], builder: Builder, first_total: int
) -> tuple[list[Update], int]:
    """Writes that share a tensor leaf belong to one update; also the number after the last total."""
    roots = [cell.val.expr for cell in cells.values()]
    roots, contributions, totals = separate(roots, list(cells), all_leaves, builder, first_total)
    writes = dict(zip(cells, roots, strict=True))
    used = {leaf: _leaves_of(root) for leaf, root in writes.items()}
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
    given: dict[int, list[Contribution]] = {}
    for c in contributions:
        tensors = [i for i in _leaves_of(c.expr) if all_leaves[i].shape]
        given.setdefault(find(tensors[0]), []).append(c)
    components: dict[int, list[int]] = {owner: [] for owner in given}
    for leaf in used:
        components.setdefault(find(leaf), []).append(leaf)
    of_first = {leaves[0]: given.get(owner, []) for owner, leaves in components.items() if leaves}
    together = _with_counters([leaves for leaves in components.values() if leaves], used, all_leaves)
    updates = [_update(all_leaves, writes, leaves, of_first.get(leaves[0], [])) for leaves in together]
    updates += [_update(all_leaves, writes, [], given[owner]) for owner, leaves in components.items() if not leaves]
    return updates, totals


def _with_counters(
    components: list[list[int]], used: Mapping[int, list[int]], all_leaves: Sequence[Leaf]
) -> list[list[int]]:
    """Give counters that nothing reads (RMSprop's) to the parameters in whose order they are, one set for each."""

    def counts(component: list[int]) -> bool:
        (first, *more) = component
        return not more and not all_leaves[first].shape and set(used[first]) <= {first}

    counters = [c for c in components if counts(c)]
    others = [c for c in components if not counts(c)]
    if not others or len(counters) % len(others):
        return components
    for i, counter in enumerate(counters):
        others[i % len(others)].extend(counter)
    return others


def _update(
    all_leaves: Sequence[Leaf], writes: Mapping[int, Expr], written: list[int], contributions: Sequence[Contribution]
) -> Update:
    """Renumber the leaves of one update to positions in its member."""
    builder = Builder()
    position: dict[int, int] = {}
    made: dict[int, Expr] = {}

    roots = [*(writes[leaf] for leaf in written), *(c.expr for c in contributions)]
    sizes = {all_leaves[leaf].shape for leaf in written} - {()}
    sizes |= {all_leaves[i].shape for root in roots for i in _leaves_of(root)} - {()}
    if len(sizes) > 1:
        raise Unsupported("write", f"one update reads tensors of shapes {sorted(sizes)}: a sum over several parameters")

    def place(leaf: int) -> int:
        return position.setdefault(leaf, len(position))

    for e in postorder(roots):
        if e.op == "leaf":
            assert isinstance(e.value, int)
            made[id(e)] = builder.make("leaf", (), place(e.value), e.dtype, e.tensor)
        else:
            made[id(e)] = (
                e if not e.args else builder.make(e.op, tuple(made[id(a)] for a in e.args), e.value, e.dtype, e.tensor)
            )
    pairs = [(place(leaf), made[id(writes[leaf])]) for leaf in written]
    added = [(c.total, made[id(c.expr)]) for c in contributions]
    leaves = [all_leaves[i] for i in position]
    slots = [Slot(bool(leaf.shape), leaf.dtype if leaf.shape else torch.float64) for leaf in leaves]
    return Update(pairs, added, [tuple(position)], [_label(leaf.name) for leaf in leaves], slots)


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
    if "param" in low:
        return "param"
    named = [part for part in low.split("_") if not part.isdigit()]  # g_ema_3: an entry of a list
    return "_".join(named[1:] if named[:1] in (["g"], ["l"]) and len(named) > 1 else named) or last
