"""00_dynamo_graph.py: the graph as Dynamo captured it; 03_fused_graph.py: a script that compares it with the fused."""

from __future__ import annotations

import builtins
import math
import os
import pathlib
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import labels_of, parameters, typed
from npu_fuse_pass.dump.script.captured import CapturedStep
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.passes.rewrite import argument_name

_LARGE = 2**22  # elements; above that the script works on smaller tensors
_SMALL = 16
_IMPORTED = ("inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree")  # by the template, or not needed
_TEMPLATE = pathlib.Path(__file__).parent / "script_template.py"
_BEGIN, _END = "# what follows differs from step to step\n", "# what follows is the same for every step\n"


def captured(contents: Contents) -> str:
    """The captured graph; of a rule optimizer's own step the rules, which Dynamo's graph only names."""
    if contents.original is not None:
        text: str = contents.original.print_readable(print_output=False)
        return re.sub(r"(?<=# File: )(\S*/site-packages/|" + re.escape(f"{os.getcwd()}/") + ")", "", text)
    arguments = _arguments(contents)
    head = "Dynamo's graph is one operation, torch.ops.npu_fused.rule_step; this is what it stands for, as traced."
    shapes = [f"# {name}: {typed(contents.grouped.leaves[i])}" for i, name in arguments.items()]
    step = CapturedStep(contents, arguments)
    return "\n".join([f'"""{head}"""', "", *shapes, "", "", *_class("Captured", step.graph, step.functions), ""])


def script(contents: Contents) -> str | None:
    """The script; None where nothing is fused."""
    gm = contents.report.fused_graph
    if not contents.captured.updates or gm is None:
        return None
    arguments = _arguments(contents)
    step = CapturedStep(contents, arguments)
    returned = sorted(leaf.index for leaf in contents.grouped.leaves if leaf.kind == "output")
    sources = [*_class("Captured", step.graph, step.functions), "", "", *_class("Fused", gm.graph, {})]
    names = step.globals | step.graph.python_code("self").globals | gm.graph.python_code("self").globals
    body = "\n".join(
        [
            *_imports(names),
            *_inputs(contents, arguments),
            f"RETURNED = {returned}  # what is new",
            "",
            "",
            *sources,
            "",
            "",
            "",
        ]
    )
    for g in contents.grouped.all_groups:
        body = body.replace(repr(g.formula.text), f"FORMULA_{g.name}")
    before, _, rest = _TEMPLATE.read_text(encoding="utf-8").partition(_BEGIN)
    inductor = "import torch._inductor.inductor_prims  # torch.ops.prims.fma\n\n" * ("torch.ops.prims.fma" in body)
    return before + inductor + "\n".join([*_formulas(contents), body]) + rest.partition(_END)[2]


def _arguments(contents: Contents) -> dict[int, str]:
    """The step's arguments, in order: leaves with their names in the fused graph."""
    leaves = enumerate(contents.grouped.leaves)
    return {i: argument_name(leaf) for i, leaf in leaves if leaf.kind in ("input", "attribute")}


def _class(name: str, graph: fx.Graph, functions: Mapping[str, str]) -> Iterator[str]:
    """A graph as a module-like class; the functions that it calls are methods."""
    yield f"class {name}:"
    for source, function in {**functions, graph.python_code("self").src: "forward"}.items():
        yield textwrap.indent(source.strip().replace("def forward(", f"def {function}(", 1), "    ")
        yield ""


def _imports(names: Mapping[str, Any]) -> Iterator[str]:
    """Statements that define names which fx gives to what it calls."""
    for name, value in names.items():
        if name in _IMPORTED or vars(builtins).get(name) is value:
            continue
        if isinstance(value, types.MethodDescriptorType):
            yield f"{name} = torch.Tensor.{value.__name__}"
        else:
            yield f"from {value.__module__} import {value.__qualname__} as {name}"


def _formulas(contents: Contents) -> Iterator[str]:
    for g in contents.grouped.all_groups:
        labels = labels_of(g, contents.grouped.leaves, g.members[0])
        yield f"# {g.name}  {parameters(len(g.members), g.of_params)}"
        yield from (f"#     {line}" for line in readable(g.formula, labels).splitlines())
        yield f'FORMULA_{g.name} = """\\\n{g.formula.text}"""'
        yield ""


def _inputs(contents: Contents, arguments: Mapping[int, str]) -> Iterator[str]:
    """Dtype and shape of every argument, and what the formulas call it."""
    leaves = contents.grouped.leaves
    large = sum(math.prod(leaf.shape) for leaf in leaves) > _LARGE and not contents.grouped.segments
    labels = {
        i: label for g in contents.grouped.all_groups for m in g.members for i, label in zip(m, g.labels, strict=True)
    }
    zeros = {leaves.index(d.leaf) for d in contents.captured.decided if d.zero}
    switches = _compared_with_zero(contents)
    yield "# dtype and shape of every argument"
    if large:
        yield f"# (the model's are larger: here no dimension has more than {_SMALL} elements)"
    yield "INPUTS = {"
    for i, name in arguments.items():
        shape = tuple(min(d, _SMALL) for d in leaves[i].shape) if large else tuple(leaves[i].held or leaves[i].shape)
        yield f'    "{name}": ({leaves[i].dtype}, {shape}),  # {labels.get(i, leaves[i].name)}'
    yield "}"
    names = [name for i, name in arguments.items() if i in switches]
    yield f"SWITCHES = {names}  # numbers that the step compares with zero"
    names = [name for i, name in arguments.items() if i in zeros]
    yield f"ZEROS = {names}  # numbers that have to be zero, as they were when this was compiled"


def _compared_with_zero(contents: Contents) -> set[int]:
    """Leaves that a formula compares with zero: a weight decay, a flag for infinite gradients."""
    return {
        m[leaf.value]  # type: ignore[index]
        for g in contents.grouped.all_groups
        for e in postorder(g.formula.roots)
        if e.op in ("eq", "ne")
        for leaf in e.args
        if leaf.op == "leaf" and not leaf.tensor
        for m in g.members
    }
