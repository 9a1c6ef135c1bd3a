"""Side effects of a node of a graph: what it writes, and if its place in the order matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.fx_nodes.names import Operation, operation_name
from npu_fuse_pass.private_torch import DispatchMode, need, storage_key

Place = tuple[fx.Node, int]
"""A tensor that a node is given: an argument, and the position in it where that is a list (else 0)."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one call does.

    Attributes:
        written: arguments that it writes in place.
        returned: for each of its results the argument that it is itself, or None.
        ordered: it draws random numbers, or may have effects that cannot be seen: such calls keep their order.
    """

    written: tuple[Place, ...]
    returned: tuple[Place | None, ...]
    ordered: bool


class Effects:
    """The effects of the nodes of one graph; equal calls are tried out once."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[list[int], list[int | None], bool] | None] = {}

    def of(self, node: fx.Node) -> Effect | None:
        """The effect of a node's call, tried out on tensors without memory; None where it cannot be tried out."""
        if not node.all_input_nodes and not _tensors(recorded(node)):
            return None  # it is there for what it changes in torch, where a trial would leave it changed
        places = [(n, k) for n in node.all_input_nodes for k, _ in enumerate(_tensors(recorded(n)))]
        key = (node.target, *_described(node))
        if key not in self._known:
            self._known[key] = _tried(node, places)
        effect = self._known[key]
        if effect is None:
            return None
        written, returned, ordered = effect
        return Effect(
            tuple(places[i] for i in written), tuple(None if i is None else places[i] for i in returned), ordered
        )


def writes_leaves(graph: fx.Graph, of_parameters: bool = False) -> bool:
    """True if in-place operations write floating-point arguments or attributes of a graph, also through views.

    What a model's layers write by themselves (batch norm its averages, `relu(x, inplace=True)`) is no update. Counters
    are none without something that they count.

    Args:
        of_parameters: only what autograd tracks counts.
    """
    own = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    storages = {key for n in own if (key := storage_of(recorded(n))) is not None}
    for node in graph.nodes:
        if node.op.startswith("call_"):
            for target in _written(node):
                value = recorded(target)
                if value is None and target in own:
                    return True  # an unknown function may write anything
                if isinstance(value, Tensor) and (target in own or _lies_in(value, storages)):
                    counts = value.is_floating_point() or value.is_complex()
                    if counts and (value.requires_grad or not of_parameters):
                        return True
    return False


def _lies_in(value: Tensor, storages: Collection[int]) -> bool:
    try:
        return storage_of(value) in storages
    except NotImplementedError:  # within torch.vmap tensors wrap others, and have no memory
        return False


def _written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an in-place operation writes."""
    name = operation_name(node)
    schema = getattr(node.target, "_schema", None) if isinstance(node.target, Operation) else None
    if schema is not None:
        arguments = schema.arguments
        given = [*zip(arguments, node.args, strict=False), *((a, node.kwargs.get(a.name)) for a in arguments)]
        written: list[Any] = [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]
    else:
        in_place = name.endswith("_") and not name.endswith("__")
        written = [*(node.args[:1] if in_place else ()), node.kwargs.get("out")]
    found: list[fx.Node] = []
    fx.node.map_arg(written, found.append)
    return found


def storage_of(fake: Any) -> int | None:
    """A key that tensors with shared memory have in common."""
    return storage_key(fake.untyped_storage()) if isinstance(fake, Tensor) else None


def recorded(node: Any) -> Any:
    """What torch's own shape propagation recorded for a node: fake tensors, which alias as the real ones do."""
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else None


def has_record(node: fx.Node) -> bool:
    """True if torch has recorded a node's result; None is a result, too."""
    return "val" in node.meta or "example_value" in node.meta


def entries(value: Any) -> list[Any]:
    """What nested lists, tuples, dicts and slices hold, in order."""
    found: list[Any] = []
    fx.node.map_aggregate(value, found.append)
    return found


def called(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a node's target gives: a function, or a method of its first argument by name."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _tensors(value: Any) -> list[Tensor]:
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    return [v for v in several if isinstance(v, Tensor)]


def _described(node: fx.Node) -> tuple[object, ...]:
    """A node's arguments as far as they can matter to what it does; the same node twice is told from two."""
    nodes = {n: i for i, n in enumerate(node.all_input_nodes)}
    tensors = [(str(t.device), *_form(t)) for n in nodes for t in _tensors(recorded(n))]
    numbers = [type(recorded(n)).__name__ for n in nodes]
    text = repr(fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"node {nodes[n]}"))
    return text, tuple(tensors), tuple(numbers)


def _number(value: Any) -> Any:
    """An example of a symbolic number; asking for the number itself would fix it."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


class _WriteRecorder(DispatchMode):
    """A mode that records what operations write, and those that draw random numbers or are not torch's own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int | None] = set()
        self.ordered = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        random = torch.Tag.nondeterministic_seeded in function.tags
        self.ordered |= random or function.namespace not in ("aten", "prims", "prim")
        named = dict(zip([a.name for a in function._schema.arguments], args, strict=False)) | dict(kwargs or {})
        for a in function._schema.arguments:
            if a.alias_info is not None and a.alias_info.is_write:
                self.written |= {storage_of(t) for t in _tensors(named.get(a.name))}
        return function(*args, **(kwargs or {}))


def _tried(node: fx.Node, places: list[Place]) -> tuple[list[int], list[int | None], bool] | None:
    recorder = _WriteRecorder()
    try:
        fake_mode = need("torch._subclasses.fake_tensor.FakeTensorMode")
        with torch.no_grad(), fake_mode(allow_non_fake_inputs=True):
            stand_ins = {n: _stand_in(recorded(n)) for n in node.all_input_nodes}
            tensors = [_tensors(stand_ins[n])[k] for n, k in places]
            before = [_form(t) for t in tensors]
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), stand_ins.__getitem__)
            with recorder:
                result = called(node.target, args, kwargs)
            if before != [_form(t) for t in tensors]:
                return None  # it changes what a tensor is, not only what it holds
            if [_form(t) for t in _tensors(result)] != [_form(t) for t in _tensors(recorded(node))]:
                return None  # it is not what torch has recorded
            written = [i for i, t in enumerate(tensors) if storage_of(t) in recorder.written]
    except Exception:  # whatever a function does with tensors that hold nothing
        return None
    numbers = {id(t): i for i, t in enumerate(tensors)}
    several = list(result) if isinstance(result, (list, tuple)) else [result]
    return written, [numbers.get(id(r)) for r in several], recorder.ordered


def _stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes, strides = [int(_number(s)) for s in value.shape], [int(_number(s)) for s in value.stride()]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_stand_in, value)) if type(value) in (list, tuple) else list(map(_stand_in, value))
    return _number(value)


def _form(t: Tensor) -> tuple[object, ...]:
    return tuple(map(_number, t.shape)), tuple(map(_number, t.stride())), t.dtype
