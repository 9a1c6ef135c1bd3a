"""00_dynamo_graph.py: the graph as Dynamo captured it, lists and repetitions in short."""

from __future__ import annotations

from collections.abc import Iterator

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import counted, typed
from npu_fuse_pass.dump.script.code import INDENT, Code, wrapped
from npu_fuse_pass.dump.script.inputs import Inputs, inputs_of, original_places
from npu_fuse_pass.dump.script.reference import reference

_LONG = 100


def original(contents: Contents) -> str | None:
    """The captured graph; of a rule optimizer by itself its rules, which Dynamo's graph only names."""
    inputs = inputs_of(contents)
    lines = list(_described(contents, inputs))
    if contents.original is None:
        made = reference(contents, inputs)
        code = Code(made.graph, made.places, inputs.lengths, made.functions)
        lines = [
            "# Dynamo's graph is one operation, torch.ops.npu_fused.rule_step; this is what it stands for, as traced:",
            "",
            *made.definitions,
            *lines,
        ]
    else:
        graph = contents.original.graph
        code = Code(graph, original_places(contents, graph, inputs), inputs.lengths, sources=True)
    lines += [*wrapped(f"def step({', '.join(inputs.names)}):"), *code.lines(), f"{INDENT}return {code.returned()}", ""]
    return "\n".join(lines)


def _described(contents: Contents, inputs: Inputs) -> Iterator[str]:
    """What every argument is."""
    leaves = contents.grouped.leaves
    for name, indices in inputs.lists.items():
        text = counted(typed(leaves[i]) for i in indices)
        yield f"# {name}, {len(indices)} of them: {text if len(text) < _LONG else text[:_LONG] + '…'}"
    for name, index in inputs.single.items():
        yield f"# {name}: {typed(leaves[index])}, {leaves[index].name}"
