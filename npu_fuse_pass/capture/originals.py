"""Operations that no kernel computes: they stay as they are, called as they were captured, between fused kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.values import STALE, Cell, Scalars, Val, View
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import Effects, Place, has_record, recorded, storage_of
from npu_fuse_pass.ir.expr import Builder, Expr, postorder
from npu_fuse_pass.ir.types import Call, Leaf, LeafRef
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.tensors.sharded import is_dtensor

Env = Mapping[fx.Node, Any]
"""Values of a graph's nodes: cells, lists of cells, or other objects."""


@dataclasses.dataclass
class Level:
    """The original operations of one level, and what they read."""

    writes: dict[int, Cell] = dataclasses.field(default_factory=dict)
    calls: list[Call] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Viewing:
    """An original operation that gives views, to be called again on other values of what they are views of.

    Attributes:
        call: the operation, with `_BASE` in the place of that tensor.
        fakes: what torch has recorded of its results.
        place: which of these the view is.
        base: what torch has recorded of the tensor.
        level: of the operation's other inputs.
    """

    call: Call
    name: str
    fakes: tuple[Tensor, ...]
    place: int = 0
    base: Any = None
    level: int = 0

    def given(self, base: int) -> Any:
        """The arguments with a leaf as that tensor."""

        def filled(x: Any) -> Any:
            return LeafRef(base) if x == LeafRef(_BASE) else x

        return fx.node.map_aggregate((self.call.args, self.call.kwargs), filled)


class _Interpreter(Protocol):
    builder: Builder
    leaves: list[Leaf]

    def add_leaf(self, leaf: Leaf, tensor: bool, number: torch.dtype | None = None) -> Cell: ...
    def here(self, reason: Reason) -> Reason: ...
    def replace(self, cell: Cell, val: Val) -> None: ...
    def moves(self, given: Sequence[Val], made: Sequence[Val], fused: bool) -> None: ...
    def copies(self, given: Sequence[Val], made: Sequence[Val]) -> None: ...


class Originals:
    """The original operations of one graph, in levels: each reads what kernels and the levels before have made.

    Attributes:
        reasons: why each operation stays, by its name.
    """

    def __init__(self, interpreter: _Interpreter) -> None:
        self.levels: list[Level] = []
        self.reasons: dict[tuple[str, str], Reason] = {}  # once for each operation and text
        self._interpreter = interpreter
        self._effects = Effects()
        self._level_of: dict[int, int] = {}
        self._ordered = 0  # the level of the last operation whose place in the order matters
        self._temporaries: dict[object, int] = {}
        self._lies_in: dict[int, int] = {}  # of leaves that lie in the memory of another one: which

    def memory_of(self, leaf: int) -> int:
        """The leaf in whose memory one lies: that of which it is a view, or itself."""
        return self._lies_in.get(leaf, leaf)

    def keep(self, node: fx.Node, name: str, reason: Reason, env: Env) -> Any:
        """Leave an operation as it is: the same target with the same arguments.

        Its inputs become temporaries, its results leaves. For a tensor that it writes in place it gets a copy
        that nothing else reads, whose content then becomes the tensor's value.

        Returns:
            A cell, a list of cells, or None, as the operation does.

        Raises:
            Unsupported: the effects or results of the operation are not known.
        """
        name = str(node.args[1]) if name == "getattr" else name  # `x.mT`
        effect, meta = self._effects.of(node), recorded(node)
        several = isinstance(meta, (list, tuple))
        fakes: list[Any] = list(meta) if several else [] if meta is None else [meta]
        known = has_record(node) or not node.users
        number = number_type(meta)
        tensors = all(isinstance(fake, Tensor) for fake in fakes)
        if effect is None or not known or not (tensors or number in (int, float)):
            raise Unsupported.of(reason)
        returned = effect.returned if fakes else ()
        if len(returned) != len(fakes) or any(isinstance(env[n], Scalars) for n in node.all_input_nodes):
            raise Unsupported.of(reason)
        cells = [cell for n in node.all_input_nodes for cell in _cells(env[n])]
        written = {(n, k): _entry(env[n], k) for n, k in effect.written}
        wholes = Counter(cell.lineage()[-1] for cell in cells)
        if len(written) > 1 and any(wholes[cell.lineage()[-1]] > 1 for cell in written.values()):
            raise Unsupported.of(reason)  # it may read or write what it has written before
        if name in _OF_MEMORY and not all(map(_fills_its_storage, map(recorded, node.all_input_nodes))):
            raise Unsupported.of(reason)
        if effect.ordered:
            for place, cell in written.items():
                self._settle(cell, _example(*place), reason)
        vals = [cell.read() for cell in cells]
        if not effect.written and not effect.ordered and fakes and None not in returned:
            same = [_entry(env[place[0]], place[1]) for place in returned if place is not None]
            return same if several else same[0]  # contiguous() of a contiguous tensor, for example
        level = max((self._level(val.expr) for val in vals), default=0)
        if effect.ordered:
            level = self._ordered = max(level, self._ordered)
        if number is not None:
            reason = dataclasses.replace(reason, remedy=_OF_NUMBERS)
        call = Call(node.target, (), {}, [], several, node.name, number=number is not None)
        held = {place: self._held(cell.read(), level, _example(*place), call.copies) for place, cell in written.items()}
        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self._given(n, env[n], held))
        call.args, call.kwargs = given
        new = {}
        for place, holder in held.items():
            cell = written[place]
            new[place] = self._left_in(holder, level)
            call.written.append((holder, _index(new[place])))
            self._interpreter.replace(cell, new[place])
        made = []
        owners = _owners(node, env)
        plain = not effect.written and not effect.ordered and not any(returned) and name not in _OF_MEMORY
        again = _Viewing(call, name, tuple(fakes)) if plain and len(fakes) <= _MANY else None
        for i, (fake, itself) in enumerate(zip(fakes, returned, strict=True)):
            val = new.get(itself) if itself is not None else None
            if number is not None:
                val = self._number(name, number, level)
            elif val is None:
                val = self._result(name, fake, level)
            call.results.append(_index(val))
            given_cell = None if itself is None else _entry(env[itself[0]], itself[1])
            owner = owners.get(storage_of(fake), [])
            made.append(given_cell or Cell(val, None, self._view(again, i, node, env, owner)))
            if itself is None and len(owner) == 1:
                place, cell = owner[0]
                base = held[place] if place in held else self._stored(cell.val, _example(*place))
                self._lies_in[_index(val)] = self.memory_of(base)
        self._at(level).calls.append(call)
        self._interpreter.moves(vals, [*(c.val for c in made), *new.values()], fused=False)
        self.reasons.setdefault((name, reason.text), dataclasses.replace(reason, op=name))
        return made if several else made[0] if made else None

    def _at(self, level: int) -> Level:
        while len(self.levels) <= level:
            self.levels.append(Level())
        return self.levels[level]

    def temporary(self, val: Val) -> Expr:
        """A value as a contiguous tensor that a stage ahead of its readers makes."""
        level = self._level(val.expr)
        index = self._temporary(val, level, self._device(), torch.empty(val.shape, device="meta").stride())
        expr = self._interpreter.builder.leaf(index, val.dtype, tensor=True)
        self._level_of[id(expr)] = level + 1
        return expr

    def _result(self, name: str, fake: Tensor, level: int) -> Val:
        place = f"{name}_{len(self._interpreter.leaves)}"
        shape, strides = tuple(map(int, fake.shape)), tuple(map(int, fake.stride()))
        leaf = Leaf("result", place, dtype=fake.dtype, shape=shape, device=fake.device, strides=strides)
        return self._new(leaf, level)

    def _left_in(self, holder: int, level: int) -> Val:
        """What an operation leaves in a tensor that it writes."""
        val = self._new(self._interpreter.leaves[holder], level)
        self._lies_in[_index(val)] = holder
        return val

    def _number(self, name: str, kind: type, level: int) -> Val:
        """A Python number that an operation gives, as a leaf."""
        leaf = Leaf("result", f"{name}_{len(self._interpreter.leaves)}")
        return self._new(leaf, level, torch.int64 if kind is int else torch.float64)

    def _new(self, leaf: Leaf, level: int, number: torch.dtype | None = None) -> Val:
        """The value of a new leaf, which an operation of this level gives."""
        val = self._interpreter.add_leaf(leaf, bool(leaf.shape), number).val
        self._level_of[id(val.expr)] = level + 1
        return val

    def _level(self, root: Expr) -> int:
        """The number of stages that have to run before an expression can be evaluated."""
        for e in postorder([root]):
            if id(e) not in self._level_of:
                self._level_of[id(e)] = max((self._level_of[id(a)] for a in e.args), default=0)
        return self._level_of[id(root)]

    def _given(self, n: fx.Node, value: Any, held: Mapping[Place, int], k: int = 0) -> Any:
        """An argument of an operation, as references to leaves."""
        if isinstance(value, (list, tuple)):
            return [self._given(n, v, held, i) for i, v in enumerate(value)]
        if not isinstance(value, Cell):
            return value
        if (n, k) in held:
            return LeafRef(held[n, k])
        example = _example(n, k)
        number = number_type(example)
        if number is None and value.val.number:
            number = float if value.val.dtype.is_floating_point else int
        return LeafRef(self._stored(value.read(), example), number)

    def _view(
        self, again: _Viewing | None, i: int, node: fx.Node, env: Env, owners: Sequence[tuple[Place, Cell]]
    ) -> View | None:
        """How the i-th result is a view of one of its owners, the arguments in whose memory it lies."""
        if not owners:
            return None
        place, base = owners[0]
        example = _example(*place)
        if again is None or len(owners) > 1 or is_dtensor(example) or dense_strides(example) is None:
            return View(base, base.val)
        fake, level = again.fakes[i], 0
        for n in node.all_input_nodes:
            if n is not place[0]:
                level = max([level, *(self._level(cell.val.expr) for cell in _cells(env[n]))])
        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self._given(n, env[n], {place: _BASE}))
        call = dataclasses.replace(again.call, args=given[0], kwargs=given[1])
        again = dataclasses.replace(again, call=call, place=i, base=example, level=level)
        put = functools.partial(self._put, again) if _is_injective(fake) else None
        return View(base, base.val, functools.partial(self._again, again), put)

    def _again(self, view: _Viewing, base: Val) -> Val:
        """The value of a view of what has a new value."""
        level = max(view.level, self._level(base.expr))
        self._note(self._interpreter.here(Code.VIEW_STALE(STALE, "view")))
        return self._viewed(view, self._stored(base, view.base), level, [])

    def _put(self, view: _Viewing, base: Val, val: Val, reason: Reason) -> Val:
        """The value of a tensor of which a view was written: a copy of the tensor, into which the view is copied."""
        level = max(view.level, self._level(base.expr), self._level(val.expr))
        self._note(reason)
        copies: list[tuple[int, int]] = []
        holder = self._held(base, level, view.base, copies)
        part = self._viewed(view, holder, level, copies)
        new = self._left_in(holder, level)
        args = LeafRef(_index(part)), LeafRef(self._stored(val, view.fakes[view.place]))
        copy = Call("copy_", args, {}, [], False, view.call.node, written=[(holder, _index(new))])
        self._at(level).calls.append(copy)
        self._interpreter.copies([base, val], [base, new])
        return new

    def _viewed(self, view: _Viewing, base: int, level: int, copies: list[tuple[int, int]]) -> Val:
        """Call the operation that makes a view once more, on a leaf."""
        vals = [self._result(view.name, t, level) for t in view.fakes]
        given: Any = view.given(base)
        results = [_index(val) for val in vals]
        self._lies_in |= dict.fromkeys(results, self.memory_of(base))
        call = dataclasses.replace(view.call, args=given[0], kwargs=given[1], results=results, copies=copies)
        self._at(level).calls.append(call)
        return vals[view.place]

    def _note(self, reason: Reason) -> None:
        self.reasons.setdefault((reason.op, reason.text), reason)

    def _settle(self, cell: Cell, example: Tensor, reason: Reason) -> None:
        """Let a tensor with gaps lie in memory as it does without fusion: what random operations draw depends on it.

        Raises:
            Unsupported: it is no view that can be made again.
        """
        if self._leaf(cell.read(), example) is None and dense_strides(example) is None:
            if cell.view is None or cell.view.again is None:
                raise Unsupported.of(reason)
            cell.val = cell.view.again(cell.view.base.read())

    def _held(self, val: Val, level: int, example: Any, copies: list[tuple[int, int]]) -> int:
        """A leaf for a tensor written in place: it holds the current value, and nothing else reads it."""
        stored = self._leaf(val, example)
        if stored is None:
            return self._like(val, level, example)
        holder = self._beside(stored)
        copies.append((stored, holder))
        return holder

    def _beside(self, index: int) -> int:
        """A leaf for a copy of what another one holds."""
        leaves = self._interpreter.leaves
        name = f"copy_{len(leaves)}"
        leaves.append(dataclasses.replace(leaves[index], kind="result", name=name, index=-1, optimizer=None))
        return len(leaves) - 1

    def copied(self, val: Val) -> int:
        """A leaf that holds a copy of a leaf's value, made before the step writes that one."""
        level, index = self._level(val.expr), _index(val)
        copy = self._beside(index)
        self._at(level).calls.append(self._copy(index, copy))
        return copy

    def read_apart(self, written: Mapping[int, Cell]) -> None:
        """Let the last kernels read copies of the views of what they write."""
        read = {e.value for e in postorder([cell.val.expr for cell in written.values()]) if e.op == "leaf"}
        for level in self.levels:
            calls, level.calls = level.calls, []
            for call in calls:
                views = [i for i in call.results if i in read and self.memory_of(i) in written]
                places = {i: self._beside(i) for i in views}
                call.results = [places.get(i, i) for i in call.results]
                level.calls += [call, *(self._copy(place, i) for i, place in places.items())]

    def _copy(self, index: int, copy: int) -> Call:
        """A call that copies what one leaf holds to another, as it lies in memory."""
        holder, leaf = self._beside(index), self._interpreter.leaves[index]
        val = Val(self._interpreter.builder.leaf(index, leaf.dtype, bool(leaf.shape)), leaf.dtype, leaf.shape)
        self._interpreter.copies([val], [val])
        itself = torch.ops.aten.detach.default
        return Call(itself, (LeafRef(holder),), {}, [copy], several=False, copies=[(index, holder)])

    def _leaf(self, val: Val, example: Any) -> int | None:
        """The leaf whose stored value this is, if any, and if it lies in memory as the example does."""
        if val.expr.op != "leaf":
            return None
        assert isinstance(val.expr.value, int)
        leaf = self._interpreter.leaves[val.expr.value]
        same = (leaf.dtype, leaf.held or leaf.shape) == (val.dtype, val.shape) and _lies_like(leaf, example)
        return val.expr.value if val.number or same else None

    def _stored(self, val: Val, example: Any) -> int:
        """A leaf that holds a value as soon as it can be computed: later readers may run earlier."""
        stored = self._leaf(val, example)
        if stored is not None:
            return stored
        key = (id(val.expr), val.dtype, val.shape, _like_strides(example))
        if key not in self._temporaries:
            self._temporaries[key] = self._like(val, self._level(val.expr), example)
        return self._temporaries[key]

    def _like(self, val: Val, level: int, example: Any) -> int:
        """A temporary with the device and strides that the value has without fusion."""
        device = example.device if isinstance(example, Tensor) and val.shape else self._device()
        return self._temporary(val, level, device, _like_strides(example) if val.shape else None)

    def _device(self) -> torch.device:
        """The device of the step's tensors."""
        return next((leaf.device for leaf in self._interpreter.leaves if leaf.shape), torch.device("cpu"))

    def _temporary(self, val: Val, level: int, device: torch.device, strides: tuple[int, ...] | None) -> int:
        leaves = self._interpreter.leaves
        index, dtype = len(leaves), torch.float64 if val.number else val.dtype
        leaves.append(Leaf("temporary", f"t{index}", dtype=dtype, shape=val.shape, device=device, strides=strides))
        self._at(level).writes[index] = Cell(val, index)
        return index


_BASE = -1  # stands for the leaf of a view's base
_MANY = 64  # views of one operation: each that is read again is another such operation, with as many results
_OF_MEMORY = ("as_strided", "as_strided_copy", "as_strided_scatter", "set_")  # they read a tensor's whole storage
_OF_NUMBERS = "compute this number with + - * / // % **, min, max, round or int, which need no call between kernels"


def number_type(value: Any) -> type[int] | type[float] | type[bool] | None:
    """The type of a Python number, which torch may have made symbolic; None for anything else."""
    kinds = {bool: (bool, torch.SymBool), int: (int, torch.SymInt), float: (float, torch.SymFloat)}
    return next((kind for kind, forms in kinds.items() if isinstance(value, forms)), None)


def _cells(value: Any) -> list[Cell]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Cell)]


def _entry(value: Any, k: int) -> Any:
    return value[k] if isinstance(value, (list, tuple)) else value


def _example(n: fx.Node, k: int) -> Any:
    return _entry(recorded(n), k)


def _index(val: Val) -> int:
    assert isinstance(val.expr.value, int)
    return val.expr.value


def _owners(node: fx.Node, env: Env) -> dict[int | None, list[tuple[Place, Cell]]]:
    """Arguments of an operation by the memory in which they lie."""
    found: dict[int | None, list[tuple[Place, Cell]]] = {}
    for n in node.all_input_nodes:
        for k, cell in enumerate(env[n] if isinstance(env[n], (list, tuple)) else [env[n]]):
            memory = storage_of(_example(n, k)) if isinstance(cell, Cell) else None
            if memory is not None:
                found.setdefault(memory, []).append(((n, k), cell))
    return found


def _is_dense(t: Tensor) -> bool:
    # older versions have the form alone that guards symbolic sizes
    asked = find(
        "torch._prims_common.is_non_overlapping_and_dense_or_false", "torch._prims_common.is_non_overlapping_and_dense"
    )
    return bool(asked(t)) if asked is not None else torch.empty_like(t).stride() == t.stride()


def dense_strides(example: Any) -> tuple[int, ...] | None:
    """The strides of a computed tensor without fusion."""
    if not isinstance(example, Tensor) or not _is_dense(example):
        return None
    return tuple(map(int, example.stride()))


def _like_strides(example: Any) -> tuple[int, ...] | None:
    """The strides of what torch computes of a tensor entry by entry: its own, without gaps."""
    strides = dense_strides(example)
    if strides is None and isinstance(example, Tensor):
        strides = tuple(map(int, torch.empty_like(example, device="meta").stride()))
    return strides


def _lies_like(leaf: Leaf, example: Any) -> bool:
    """False if a leaf is known to lie in memory in another way than a tensor."""
    if leaf.strides is None or not isinstance(example, Tensor):
        return True
    return all(n < 2 or int(a) == b for n, a, b in zip(example.shape, example.stride(), leaf.strides, strict=True))


def _fills_its_storage(t: Any) -> bool:
    """True if a tensor's storage holds nothing else, so that a copy's storage holds the same."""
    return not isinstance(t, Tensor) or (_is_dense(t) and int(t.untyped_storage().nbytes()) == t.numel() * t.itemsize)


def _is_injective(t: Tensor) -> bool:
    """True if no two elements are known to lie at one place, so that they can be written."""
    reach = 0
    for stride, size in sorted((int(stride), int(size)) for size, stride in zip(t.shape, t.stride(), strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True
