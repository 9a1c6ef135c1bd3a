"""A step with original operations between its fused updates (Muon's matrix products) as one GE graph.

The rewritten graph is traced to ATen and goes into torchair's public compiler unchanged: fused nodes through this
package's converters, everything between them through torchair's own. Tensors keep their shapes, which the operations in
between need; numbers are constants or enter one by one, and the host advances nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.threads import while_compiling
from npu_fuse_pass.errors import Mismatch, Unsupported
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.fused_op import multi_tensor_update, parsed
from npu_fuse_pass.ir.types import Call, Formula, Group, Leaf, LeafValues, references
from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.emit.split import Split, constants_of, split
from npu_fuse_pass.lowerings.npu.environment import conversion, require, versions
from npu_fuse_pass.lowerings.npu.execution import Execution
from npu_fuse_pass.lowerings.npu.fakes import FakeTensorMode, while_traced
from npu_fuse_pass.lowerings.npu.graph.graph import device_update
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.memory import check_apart

_NUMBER = torch.ops.aten.scalar_tensor.default  # `rewrite`'s node of a constant


class Program:
    """A step as one graph with original operations, with the interface of `npu.Program`.

    Args:
        leaves: of the captured step.
        groups: all, including those that compute inputs of the original operations.
        calls: the original operations.
        graph: by `rewrite`; its arguments are the leaves of kind "input" and "attribute", in order.
        config: torchair's CompilerConfig, passed on unchanged.

    Raises:
        PlatformError: torchair cannot be used here.
        GraphRefused: torchair does not convert the graph.
        Unsupported: a group computes what no GE operation in the whitelist does, or the host would have to take part.
    """

    begun = False
    written = False  # a graph runs as a whole

    def __init__(
        self, leaves: Sequence[Leaf], groups: Sequence[Group], calls: Sequence[Call], graph: fx.GraphModule, config: Any
    ) -> None:
        torchair = require()
        self._leaves = leaves
        self._inputs = [i for i, leaf in enumerate(leaves) if leaf.kind in ("input", "attribute")]
        made = [(leaf.index, i) for i, leaf in enumerate(leaves) if leaf.kind == "output"]
        self._outputs = [i for _, i in sorted(made)]
        written = {m[s] for g in groups for m in g.members for s in g.formula.written}
        self._written = [place for place, i in enumerate(self._inputs) if i in written]
        _check(leaves, groups, calls, written)
        constant: Callable[..., Any] = _with_constants(graph)
        if any(call.written for call in calls):  # torchair's converters expect functional operations
            constant = torch.func.functionalize(constant, remove="mutations")
        compiled = while_compiling(lambda: self._compiled(torchair, constant, config))
        self._execution = Execution(compiled, versions)

    def cost(self, g: Group) -> tuple[int, int]:
        """Bytes per element, and GE operations on tensors."""
        made = _split(g.formula, constants_of(g, self._leaves))
        operations, size = elementwise.cost(g.formula if made is None else made.device)
        return size, operations * len(g.members)

    def _compiled(self, torchair: Any, graph: Callable[..., Any], config: Any) -> Callable[..., Sequence[Tensor]]:
        from torch.fx.experimental.proxy_tensor import make_fx

        chosen = [self._leaves[i] for i in self._inputs]
        with conversion():
            with FakeTensorMode() as mode:
                fakes = [torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in chosen]
                traced = make_fx(graph)(*fakes)
            with while_traced(mode):
                compiler = torchair.get_compiler(config or torchair.CompilerConfig())
                return compiler(traced, fakes)  # type: ignore[no-any-return]

    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None:
        """Run the step; as `npu.Program`."""
        with torch.no_grad():
            given = [self._checked(values[i], self._leaves[i]) for i in self._inputs]
            written = [given[place] for place in self._written]
            check_apart(written, [t for place, t in enumerate(given) if place not in set(self._written)])
            if not all(t.is_contiguous() for t in written):
                raise Mismatch("a tensor that is written is not contiguous; the graph was compiled for contiguous ones")
            self.begun = True
            results = self._execution([t.contiguous() for t in given], self._written)
            for i, result in zip(self._outputs, results, strict=True):
                values[i] = result
            torch.autograd.graph.increment_version(written)

    def _checked(self, t: Tensor | None, leaf: Leaf) -> Tensor:
        fits = t is not None and (t.shape, t.dtype, t.device) == (leaf.shape, leaf.dtype, leaf.device)
        if t is None or not fits or t.layout is not torch.strided:
            raise Mismatch("a tensor has another size, dtype or device than when the step was compiled")
        return t.detach()


def _check(leaves: Sequence[Leaf], groups: Sequence[Group], calls: Sequence[Call], written: set[int]) -> None:
    """Raise Unsupported for steps that one graph on the device cannot do without writing a host input."""
    if any(ref.number for c in calls for ref in references((c.args, c.kwargs))):
        raise Unsupported(
            "npu", "original operations between fused updates read a tensor as a Python number", Code.GE_BETWEEN
        )
    if any(not leaves[i].shape for i in written if leaves[i].kind not in ("temporary", "result")):
        raise Unsupported(
            "npu",
            "original operations between fused updates, and a 0-dim state that the host advances",
            Code.GE_BETWEEN,
        )
    for g in groups:
        elementwise.check(g.formula)


def _split(formula: Formula, constants: Mapping[int, float]) -> Split | None:
    """Split off a formula's arithmetic on numbers; None if a number comes from a tensor."""
    try:
        return split(formula, (), False, constants)
    except Unsupported:
        return None


def _with_constants(rewritten: fx.GraphModule) -> fx.GraphModule:
    """The graph with numbers that follow from constants folded into fused nodes."""
    graph = copy.deepcopy(rewritten.graph)
    constants: dict[tuple[float, torch.dtype], fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=multi_tensor_update):
        tensors, scalars, members, text = node.args
        formula = parsed(text)
        given = {s: scalars[k * members : (k + 1) * members] for k, s in enumerate(formula.scalar_slots)}
        if not all(n.target is _NUMBER for row in given.values() for n in row):
            continue
        values = {s: [n.args[0] for n in row] for s, row in given.items()}
        if any(e.op == "numel" for e in postorder(formula.roots)):
            continue  # the check of the whole formula says that there is no GE operation for it
        made = _split(formula, {s: row[0] for s, row in values.items() if len(set(row)) == 1})
        if made is None:
            continue
        columns = {s: torch.tensor(row, dtype=torch.float64, device="cpu") for s, row in values.items()}
        dtype = elementwise.wide_dtype(formula)
        keys = [(x, dtype) for v in made.host_values(columns)[0] for x in v.double().expand(members).tolist()]
        with graph.inserting_before(node):
            for key in keys:
                if key not in constants:
                    constants[key] = graph.call_function(_NUMBER, key[:1], {"dtype": dtype})
            numbers = list(dict.fromkeys(constants[key] for key in keys))
            positions = [numbers.index(constants[key]) for key in keys]
            kept = [
                tensors[formula.tensor_slots.index(s) * members + m] for s in made.tensor_slots for m in range(members)
            ]
            args: Any = (kept, numbers, [], positions, members, made.device.text)
            node.replace_all_uses_with(graph.call_function(device_update, args))
        graph.erase_node(node)
    return fx.GraphModule(torch.nn.Module(), graph)
