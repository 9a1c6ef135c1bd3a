"""03_fused_graph.py: a script that runs the captured and the fused graph on random inputs and compares them."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence

import torch

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import labels_of, parameters, runs
from npu_fuse_pass.dump.script.code import INDENT, Code, wrapped
from npu_fuse_pass.dump.script.inputs import Inputs, fused_places, inputs_of
from npu_fuse_pass.dump.script.reference import reference
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.types import Leaf

_LARGE = 2**22  # elements; above that the script works on smaller tensors
_SMALL = 16
_TEMPLATE = pathlib.Path(__file__).parent / "script_template.py"
_BEGIN, _END = "# what follows differs from step to step\n", "# what follows is the same for every step\n"
_NUMBERS: dict[str, tuple[type, ...]] = {"int": (int, torch.SymInt), "float": (float, torch.SymFloat)}


def script(contents: Contents) -> str | None:
    """The script; None where nothing is fused."""
    gm = contents.report.fused_graph
    if not contents.captured.updates or gm is None:
        return None
    inputs = inputs_of(contents)
    names = {g.formula.text: f"FORMULA_{g.name}" for g in contents.grouped.all_groups}
    code = Code(gm.graph, fused_places(contents, gm.graph, inputs), inputs.lengths, names)
    body = [
        *_formulas(contents),
        *_inputs(contents, inputs),
        *("", ""),
        *_captured(contents, inputs),
        *("", ""),
        *wrapped(f"def fused({', '.join(inputs.names)}):"),
        *code.lines(),
        f"{INDENT}return {code.returned()}",
        *("", "", ""),
    ]
    text = "\n".join(body)
    if "torch.ops.prims.fma" in text:
        text = f"import torch._inductor.inductor_prims  # torch.ops.prims.fma\n\n{text}"
    before, _, rest = _TEMPLATE.read_text(encoding="utf-8").partition(_BEGIN)
    return before + text + rest.partition(_END)[2]


def _formulas(contents: Contents) -> Iterator[str]:
    for g in contents.grouped.all_groups:
        labels = labels_of(g, contents.grouped.leaves, g.members[0])
        yield f"# {g.name}  {parameters(len(g.members))}"
        yield from (f"#     {line}" for line in readable(g.formula, labels).splitlines())
        yield f'FORMULA_{g.name} = """\\\n{g.formula.text}"""'
        yield ""


def _captured(contents: Contents, inputs: Inputs) -> Iterator[str]:
    """The captured graph as a function that gives what the graph returns as new tensors."""
    made = reference(contents, inputs)
    yield from made.definitions
    code = Code(made.graph, made.places, inputs.lengths, made.functions)
    yield from wrapped(f"def captured({', '.join(inputs.names)}):")
    yield from _numbers(contents, inputs)
    yield from code.lines()
    returned = sorted(leaf.index for leaf in contents.grouped.leaves if leaf.kind == "output")
    yield f"{INDENT}return {code.returned(returned)}"


def _numbers(contents: Contents, inputs: Inputs) -> Iterator[str]:
    """Arguments that are Python numbers for the captured graph."""
    if contents.original is None:
        return
    given = contents.original.graph.find_nodes(op="placeholder")
    values = [n.meta.get("example_value", n.meta.get("val")) for n in given]
    for name in inputs.names:
        leaf = contents.grouped.leaves[inputs.lists[name][0] if name in inputs.lists else inputs.single[name]]
        value = values[leaf.index] if leaf.kind == "input" and leaf.optimizer is None else None
        kind = next((k for k, kinds in _NUMBERS.items() if isinstance(value, kinds)), None)
        if kind is not None:
            yield f"{INDENT}{name} = " + (f"[{kind}(x) for x in {name}]" if name in inputs.lists else f"{kind}({name})")


def _inputs(contents: Contents, inputs: Inputs) -> Iterator[str]:
    """Dtype and shape of every argument."""
    leaves = contents.grouped.leaves
    large = sum(math.prod(leaf.shape) for leaf in leaves) > _LARGE and not contents.grouped.stages
    limit = _SMALL if large else None
    yield "# dtype and shape of every argument"
    if large:
        yield f"# (the model's are larger: here no dimension has more than {_SMALL} elements)"
    switches = ", ".join(f'"{name}"' for name in _switches(contents, inputs))
    yield f"SWITCHES = [{switches}]  # numbers that the step compares with zero"
    yield f"ZEROS = {_zeros(contents, inputs)}  # numbers that have to be zero, as they were when this was compiled"
    yield "INPUTS = {"
    for name, indices in inputs.lists.items():
        yield f'{INDENT}"{name}": ['
        kinds = runs([_kind(leaves[i], limit) for i in indices])
        texts = [", ".join(pattern) if count == 1 else f"*[{', '.join(pattern)}] * {count}" for pattern, count in kinds]
        yield from wrapped(f"{2 * INDENT}{', '.join(texts)},")
        yield f"{INDENT}],"
    for name, index in inputs.single.items():
        yield f'{INDENT}"{name}": {_kind(leaves[index], limit)},'
    yield "}"


def _kind(leaf: Leaf, limit: int | None) -> str:
    shape: Sequence[int] = leaf.shape if limit is None else [min(d, limit) for d in leaf.shape]
    return f"({leaf.dtype}, {tuple(shape)})"


def _zeros(contents: Contents, inputs: Inputs) -> str:
    zeros = [contents.grouped.leaves.index(d.leaf) for d in contents.captured.decided if d.zero]
    return f"[{', '.join(f'{chr(34)}{name}{chr(34)}' for name in dict.fromkeys(inputs.places[i].name for i in zeros))}]"


def _switches(contents: Contents, inputs: Inputs) -> list[str]:
    """Arguments that are compared with zero: a weight decay, or whether a gradient is infinite."""
    found: dict[str, None] = {}
    for g in contents.grouped.all_groups:
        for e in postorder(g.formula.roots):
            for leaf in e.args if e.op in ("eq", "ne") else ():
                members = [m[leaf.value] for m in g.members] if leaf.op == "leaf" else []  # type: ignore[index]
                found |= {inputs.places[i].name: None for i in members if i in inputs.places and not leaf.tensor}
    return list(found)
