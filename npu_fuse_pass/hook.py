"""The pass as a function on functional ATen graphs, for compilers that have hooks: Inductor and torchair."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from typing import Any

from torch import fx

from npu_fuse_pass import pipeline
from npu_fuse_pass.errors import OptionError
from npu_fuse_pass.options import Options, disabled
from npu_fuse_pass.passes.splice import splice
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.report.logs import switched_off

# what Inductor asks for a `uuid`; without it it takes any function, and caches nothing that one has changed
_Cacheable: Any = find("torch._inductor.custom_graph_pass.CustomGraphPass") or object


class FusePass(_Cacheable):  # type: ignore[misc]
    """Rewrites graphs of optimizer steps in place: the N updates become fused nodes, followed by `copy_`.

    With Inductor::

        torch._inductor.config.post_grad_custom_pre_pass = npu_fuse_pass.fuse_pass    # or ..._post_pass
        step = torch.compile(opt.step, backend="inductor")

    With torchair::

        config = torchair.CompilerConfig()
        config.post_grad_custom_pre_pass = npu_fuse_pass.fuse_pass

    Graphs that update none of their arguments, and those that compute what they return with operations that cannot
    be fused (a model's forward pass, with running statistics, say), stay as they are. So does the step of an optimizer
    of this package, which is one operation there: compile it with backend="npu_fused".
    """

    def __init__(self, strict: bool = False) -> None:
        """`strict`: raise UnfusedError where something of an update is left unfused."""
        if not isinstance(strict, bool):  # also a graph, where a compiler was given the class itself
            raise OptionError(f"FusePass(strict={strict!r}): allowed are True and False; the pass is what this makes")
        self._strict = strict

    def __call__(self, graph: fx.Graph | fx.GraphModule, *given: Any) -> None:
        """Rewrite `graph`.

        Args:
            graph: a functional graph with `copy_` to its arguments as roots, and fake tensors as metadata.
            given: what torchair passes besides: example inputs and its configuration. Without them (Inductor) fused
                nodes on a CPU run generated kernels.

        Raises:
            UnfusedError: `strict`, and something was left unfused; the graph is unchanged.
        """
        if switched_off():
            return
        gm = graph if isinstance(graph, fx.GraphModule) else graph.owning_module or fx.GraphModule({}, graph)
        fused = pipeline.fuse_functional(gm, Options(strict=self._strict), kernels=not given)
        if fused is None or fused.graph is None:
            return
        splice(gm.graph, fused.graph, fused.captured)
        if gm is graph:
            gm.recompile()

    def uuid(self) -> str:
        """Identifies this version of the pass in Inductor's cache. Graphs from the cache have no report."""
        return f"npu_fuse_pass {_sources()} {self._strict} {disabled()}"


@functools.cache
def _sources() -> str:
    """A hash of the package's sources."""
    made = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        made.update(path.read_bytes())
    return made.hexdigest()


fuse_pass = FusePass()
