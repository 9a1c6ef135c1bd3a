"""A step with original operations between its fused updates (Muon's matrix products) as one GE graph.

The rewritten graph is traced to ATen and goes into torchair's public compiler as it is: fused nodes through our
converters, everything between them through torchair's own. Every tensor keeps its shape, because the operations in
between read it; numbers enter one by one, and nothing advances on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..errors import FuseError, GraphRefused, Mismatch, Unsupported
from ..ir import Call, Group, Leaf, LeafRef
from . import npu, npu_emit
from .memory import check_apart
from .npu_run import Run, refusal


class Program:
    """The interface of `npu.Program`, without layouts and dedicated operations.

    Args:
        leaves: of the captured step.
        groups: all of them, with those that make what the original operations read.
        calls: the original operations.
        graph: of `rewrite`: its arguments are the leaves of kind "input" and "attribute", in order.
        config: torchair's CompilerConfig, passed on unchanged.

    Raises:
        PlatformError: torchair cannot be used here.
        GraphRefused: torchair does not convert the graph.
        Unsupported: a group computes what no GE operation in the whitelist does, or the host would have to take part.
    """

    def __init__(
        self, leaves: Sequence[Leaf], groups: Sequence[Group], calls: Sequence[Call], graph: fx.GraphModule, config: Any
    ) -> None:
        torchair = npu.require()
        self._leaves = leaves
        self._inputs = [i for i, leaf in enumerate(leaves) if leaf.kind in ("input", "attribute")]
        made = [(leaf.index, i) for i, leaf in enumerate(leaves) if leaf.kind == "output"]
        self._outputs = [i for _, i in sorted(made)]
        written = {m[s] for g in groups for m in g.members for s in g.formula.written}
        self._written = [place for place, i in enumerate(self._inputs) if i in written]
        _check(leaves, groups, calls, written)
        traced, mode = self._traced(graph)
        fakes = [n.meta["val"] for n in traced.graph.find_nodes(op="placeholder")]
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            try:
                compiled = torchair.get_compiler(config or torchair.CompilerConfig())(traced, fakes)
            except FuseError:
                raise
            except Exception as e:
                raise GraphRefused(refusal("torchair does not convert this step's graph", e, npu.versions())) from e
        self._run = Run(compiled, npu.versions)

    def _traced(self, graph: fx.GraphModule) -> tuple[fx.GraphModule, Any]:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        with FakeTensorMode() as mode:
            chosen = [self._leaves[i] for i in self._inputs]
            fakes = [torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in chosen]
            return make_fx(graph)(*fakes), mode

    def __call__(self, values: list[Tensor | None], complete: bool = False, kinds: object = None) -> None:
        """Run the step; as `npu.Program`."""
        with torch.no_grad():
            given = [self._look(values[i], self._leaves[i]) for i in self._inputs]
            written = [given[place] for place in self._written]
            check_apart(written, [t for place, t in enumerate(given) if place not in set(self._written)])
            if not all(t.is_contiguous() for t in written):
                raise Mismatch("a tensor that is written is not contiguous; the graph was compiled for contiguous ones")
            results = self._run([t.contiguous() for t in given], self._written)
            for i, result in zip(self._outputs, results, strict=True):
                values[i] = result
            torch.autograd.graph.increment_version(written)

    def _look(self, t: Tensor | None, leaf: Leaf) -> Tensor:
        fits = t is not None and (t.shape, t.dtype, t.device) == (leaf.shape, leaf.dtype, leaf.device)
        if t is None or not fits or t.layout is not torch.strided:
            raise Mismatch("a tensor has another size, dtype or device than when the step was compiled")
        return t.detach()


def _check(leaves: Sequence[Leaf], groups: Sequence[Group], calls: Sequence[Call], written: set[int]) -> None:
    """Refuse what one graph on the device cannot do, or not without a host input that it writes."""
    if any(isinstance(ref, LeafRef) and ref.number for c in calls for ref in tree_leaves((c.args, c.kwargs))):
        raise Unsupported("npu", "original operations between fused updates read a tensor as a Python number")
    if any(not leaves[i].shape for i in written if leaves[i].kind not in ("temporary", "result")):
        raise Unsupported("npu", "original operations between fused updates, and a 0-dim state that the host advances")
    for g in groups:
        npu_emit.check(g.formula)
