"""The NPU lowering: one static GE graph for the whole step, through torchair's public compiler.

The graph that torchair gets is functional already, so it does not go through AOTAutograd again. Tensors enter as one
dimension of contiguous elements (one tensor, or all of a group that are adjacent), every number of the step in one
packed host vector; what is written leaves through a `copy_` of lists, which torchair turns into in-place outputs. Step
counters advance on the host.

torch_npu and torchair are imported when a `Program` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.capture.threads import while_compiling
from npu_fuse_pass.ir.types import Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.environment import chip, conversion, require, versions
from npu_fuse_pass.lowerings.npu.execution import Execution
from npu_fuse_pass.lowerings.npu.fakes import while_traced
from npu_fuse_pass.lowerings.npu.ge_texts import Texts
from npu_fuse_pass.lowerings.npu.graph import generated
from npu_fuse_pass.lowerings.npu.graph import names as npu_names
from npu_fuse_pass.lowerings.npu.graph.graph import build
from npu_fuse_pass.lowerings.npu.host.host import Host
from npu_fuse_pass.lowerings.npu.host.mirror import to_device
from npu_fuse_pass.lowerings.npu.host.numbers import NumberTable
from npu_fuse_pass.lowerings.npu.kernels import preview
from npu_fuse_pass.lowerings.npu.kernels.groups import generate_groups, with_totals
from npu_fuse_pass.lowerings.npu.kernels.hardware import Hardware
from npu_fuse_pass.lowerings.npu.kernels.launch import Cluster, Generated
from npu_fuse_pass.lowerings.npu.layout.bind import Binder
from npu_fuse_pass.lowerings.npu.layout.replan import Replanner
from npu_fuse_pass.lowerings.npu.lowered_group import LoweredGroup
from npu_fuse_pass.lowerings.npu.plan import Plan, Span
from npu_fuse_pass.match.result import Match, NoMatch


class Program:
    """All groups of a captured step as one GE graph; the interface of `lowerings.cpu.Program`.

    Args:
        leaves: of the captured step.
        groups: over them.
        config: torchair's CompilerConfig, passed on unchanged.
        layout: "auto" (flat as far as tensors are adjacent), "flat" (the same, however large they are), or "list".
        values: of all leaves, if known: a graph for adjacent tensors needs their addresses.
        planned: called with the program when its graph was planned anew for the tensors of a step, before any change.
        matches: by group name, the known kernel that computes it; without them everything is elementwise.
        kernels: GE operations for groups without generated kernels: "auto", "dedicated" or "elementwise".
        hardware: for generated kernels; None: there are none.
        texts: receives the GE graphs in text form if a dump is wanted.

    Raises:
        PlatformError: torchair cannot be used here.
        GraphRefused: torchair does not convert the graph.
        Unsupported: a group computes what no GE operation in the whitelist does.
    """

    begun = False
    written = False  # a graph runs as a whole

    def __init__(
        self,
        leaves: Sequence[Leaf],
        groups: Sequence[Group],
        config: Any = None,
        layout: str = "auto",
        values: LeafValues | None = None,
        planned: Callable[[Program], None] | None = None,
        matches: Mapping[str, Match | NoMatch] | None = None,
        kernels: str = "auto",
        texts: Texts | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        self._leaves, self._config, self._texts = leaves, config, texts
        self._hardware = hardware
        self._found = found = {} if hardware is None else generate_groups(leaves, groups, hardware)
        # a step whose kernels are launched without a graph needs no torchair
        made = [each for each in found.values() if isinstance(each, Generated)]
        self._by_itself = hardware is not None and bool(made) and not hardware.calls_back
        self._torchair: Any = None if self._by_itself else require()
        device = chip() if matches and not self._by_itself else ""
        self.groups = [
            LoweredGroup(g, leaves, (matches or {}).get(g.name), device, kernels, found.get(g.name, "")) for g in groups
        ]
        self._host = Host(leaves, self.groups)
        self._replanner = Replanner(leaves, self.groups, layout)
        if values is not None:
            step = self._host.prepare(values, complete=True)
            self._replanner.update(values, step.all_numbers, step.active)
        self._planned: Callable[[Program], None] | None = None  # until the first graph is there
        self._plans: list[Plan] | None = None
        self._spans: list[tuple[Span, ...]] | None = None
        self._use_plans()
        self._planned = planned

    def _use_plans(self) -> None:
        """Apply the current plans, and compile a graph for them where the one that is there is for others.

        What ends that early (a refusal, Ctrl-C) has the next step begin anew.
        """
        plans = self._replanner.plans
        if plans is self._plans:
            return
        for lowered, plan in zip(self.groups, plans, strict=True):
            lowered.plan = plan
        spans = [plan.spans for plan in plans]
        if spans != self._spans:
            self._spans = None
            self._make()
            self._spans = spans
        if self._planned is not None:
            self._planned(self)
        self._plans = plans

    def _make(self) -> None:
        """Compile the graph for the current plans."""
        self._binder = Binder(self._leaves, self.groups)
        self._clusters = self._clustered()
        if self._texts is not None:
            self._texts.kernels("" if self._hardware is None else preview.text(self._found, self._hardware))
        if self._by_itself:
            place = {key: k for k, key in enumerate(self._binder.tensor_inputs)}
            self._arguments = [
                [[place[(made.group.members[m][s],)] for made, s, m in cluster.leaves(kind)] for kind in (True, False)]
                for cluster, _ in self._clusters
            ]
            self._execution = Execution(
                self._launch, versions, "this step's kernels failed when they were first launched"
            )
            return
        if self._clusters:
            generated.serve()
        self.graph = build(
            self._leaves,
            self.groups,
            self._binder,
            {generated.known(cluster): cluster for cluster, _ in self._clusters},
        )
        fakes = [n.meta["val"] for n in self.graph.graph.find_nodes(op="placeholder")]
        self._execution = Execution(lambda *_: (), versions)
        if fakes:
            self._execution = Execution(while_compiling(lambda: self._converted(fakes)), versions)
            if self._texts is not None:
                self._texts.collect()

    def _converted(self, fakes: list[Any]) -> Callable[..., Sequence[Tensor]]:
        """The graph as torchair compiles it; the first one in a process has torchair trace patterns of its own."""
        with while_traced(fakes[0].fake_mode), npu_names.kept():
            config = self._config or self._torchair.CompilerConfig()
            compiler = self._torchair.get_compiler(self._texts.config(config) if self._texts else config)
            with conversion():
                return compiler(self.graph, fakes)  # type: ignore[no-any-return]

    def _clustered(self) -> list[tuple[Cluster, list[int]]]:
        """The nodes of generated kernels with the indices of their groups; groups with totals share one."""
        places = [k for k, lowered in enumerate(self.groups) if lowered.generated is not None]
        coupled = [k for k in places if with_totals(self.groups[k].group)]
        found = []
        for together in [*([coupled] if coupled else []), *([k] for k in places if k not in coupled)]:
            made = [g for k in together if (g := self.groups[k].generated) is not None]
            rows = [
                numbers.first
                for k in together
                for numbers in self._binder.numbers[k]
                if isinstance(numbers, NumberTable)
            ]
            first = (*made[0].made.tensor_slots, *made[0].made.states)[0]
            device = self._leaves[made[0].group.members[0][first]].device
            assert self._hardware is not None
            cluster = Cluster(made[0].group.name, made, self._leaves, rows, self._hardware, device)
            found.append((cluster, together))
        return found

    def _launch(self, *inputs: Tensor) -> tuple[()]:
        """Launch the kernels of every node on the current stream, without a graph."""
        numbers, device = inputs[-1], inputs[0].device
        if numbers.device != device:
            numbers = to_device(numbers, device)  # the only transfer while addresses stay
        addresses = list(map(Tensor.data_ptr, inputs))
        for cluster, places in zip(self._clusters, self._arguments, strict=True):
            written, read = ([addresses[k] for k in chosen] for chosen in places)
            cluster[0](written, read, numbers.data_ptr())
        return ()

    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None:
        """Run the step and fill in the values of "output" leaves.

        Args:
            values: one tensor per leaf; None for the gradient of a parameter that is left out.
            complete: check dtypes too (the caller has not).

        Raises:
            Mismatch: a tensor is not what the graph was made for; nothing was changed.
            GraphRefused: torchair does not convert the graph for tensors that have moved, or GE does not load, compile
                or run the graph the first time; nothing was changed.
            StepFailedError: a later run failed; what it writes may be partly written.
        """
        with torch.no_grad():
            step = self._host.prepare(values, complete)
            self._replanner.update(values, step.all_numbers, step.active)
            self._use_plans()
            self._binder.bind(step, values)
            for cluster, places in self._clusters:
                cluster.active = [step.active[place] for place in places]
            self.begun = True
            try:
                results = self._execution(step.inputs, self._binder.written)
            finally:
                if self._texts is not None:
                    self._texts.collect(ran=True)
            self._host.finish(step, values)
            self._binder.finish(step, values, results)
