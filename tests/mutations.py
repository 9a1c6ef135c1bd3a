"""Planted bugs: each is one replacement in the package, and the tests that have to notice it.

Texts are those of the code as it is: a mutation whose old text is gone fails, and is written anew for the new code.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A planted bug.

    Args:
        file: in npu_fuse_pass.
        old, new: what is replaced (it occurs once) and by what.
        tests: arguments of pytest, that fail with the bug and pass without.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ORDER = ("tests/test_capture.py", "-k", "what_is_read or random_programs")
OPS = "tests/test_ops_table.py"
SIGNUM = ("tests/test_papers.py", "-k", "Signum and loop and not Inline")
ROUNDING = ("tests/test_safety_half.py", "-k", "rounds_after_every_operation")

MUTATIONS = [
    # what operations compute
    Mutation(
        "add forgets alpha",
        "aten.py",
        'return b.op("add", x, y) if _is(alpha, 1) else b.op("fma", y, alpha, x)',
        'return b.op("add", x, y)',
        SIGNUM,
    ),
    Mutation(
        "sub adds alpha times",
        "aten.py",
        'b.op("fma", y, b.op("neg", alpha), x)',
        'b.op("fma", y, alpha, x)',
        (OPS, "-k", "sub"),
    ),
    Mutation(
        "lerp goes the other way",
        "aten.py",
        'distance = b.op("sub", end, start)',
        'distance = b.op("sub", start, end)',
        (OPS, "-k", "lerp"),
    ),
    Mutation(
        "addcdiv forgets its value",
        "aten.py",
        'b.op("div", y if _is(value, 1) else b.op("mul", value, y), z)',
        'b.op("div", y, z)',
        (OPS, "-k", "addcdiv"),
    ),
    Mutation(
        "a square is a double",
        "aten.py",
        '    2.0: lambda b, x: b.op("mul", x, x),',
        '    2.0: lambda b, x: b.op("add", x, x),',
        (OPS, "-k", "pow"),
    ),
    Mutation(
        "clamp has no upper end",
        "aten.py",
        'return low if max is None else b.op("minimum", low, max)',
        "return low",
        (OPS, "-k", "clamp"),
    ),
    Mutation(
        "half precision rounds once at the end",
        "aten.py",
        "return Val(b.cast(result, dtype) if dimmed else result, dtype, shape)",
        "return Val(result, dtype, shape)",
        ROUNDING,
    ),
    Mutation(
        "a mean is a sum",
        "aten_shaped.py",
        "b.numel() if x.shape else b.const(1)",
        "b.const(1)",
        ("tests/test_ops_shaped.py", "-k", "reductions_are_those"),
    ),
    # capture
    Mutation(
        "a list operation takes the first entry of a list",
        "interpreter.py",
        "return x[i] if isinstance(x, (list, tuple)) else x",
        "return x[0] if isinstance(x, (list, tuple)) else x",
        ("tests/test_papers.py", "-k", "Signum and foreach"),
    ),
    Mutation(
        "an alias is a copy",
        "interpreter.py",
        "return args[0]  # torch returns the tensor itself: what is written through it reaches the leaf",
        "return Cell(result)",
        ("tests/test_safety.py", "-k", "through_aliases"),
    ),
    Mutation(
        "what is written is not rounded to the tensor's dtype",
        "interpreter.py",
        "expr = self.builder.cast(result.expr, cell.val.dtype)",
        "expr = result.expr",
        ROUNDING,
    ),
    Mutation(
        "equal operations on different leaves are one",
        "ir.py",
        "key = (op, tuple(map(id, args)), value, dtype, tensor)",
        "key = (op, tuple(map(id, args)), dtype, tensor)",
        ORDER,
    ),
    Mutation(
        "writes of one parameter are updates of their own",
        "capture.py",
        "            if all_leaves[leaf].shape:\n                parent[find(leaf)] = find(written)",
        "            if all_leaves[leaf].shape:\n                find(leaf)",
        SIGNUM,
    ),
    Mutation(
        "parameters that share a learning rate are one update",
        "capture.py",
        "            if len(others) == 1:",
        "            if others:",
        SIGNUM,
    ),
    # grouping
    Mutation(
        "all constants are the first one", "group.py", '("constant", source.value))', '("constant", 0.0))', SIGNUM
    ),
    Mutation(
        "the order of arguments matters",
        "group.py",
        "            below.sort()",
        "            below.reverse()",
        ("tests/test_group.py", "-k", "any_order"),
    ),
    Mutation("differences commute", "ir.py", 'COMMUTATIVE = ("add",', 'COMMUTATIVE = ("sub", "add",', ORDER),
    Mutation(
        "the order of writes is that of the program",
        "group.py",
        "writes = sorted(update.writes, key=lambda w: keys[id(w[1])])",
        "writes = list(update.writes)",
        ("tests/test_group.py",),
    ),
    # code generation
    Mutation(
        "the last element of every chunk is left out",
        "lowerings/cpu_codegen.py",
        "n = left < {CHUNK} ? left : {CHUNK};",
        "n = (left < {CHUNK} ? left : {CHUNK}) - 1;",
        ORDER,
    ),
    Mutation(
        "a maximum starts at zero",
        "lowerings/cpu_codegen.py",
        '"amax": "-INFINITY"',
        '"amax": "0.0"',
        ("tests/test_ops_shaped.py", "-k", "reductions"),
    ),
    Mutation(
        "a reduction leaves out what fills no lane",
        "lowerings/cpu_codegen.py",
        "for (int l = 0; base + l < n; ++l) {",
        "for (int l = 0; base + l + 1 < n; ++l) {",
        ("tests/test_ops_shaped.py", "-k", "reductions"),
    ),
    Mutation(
        "fma is a product",
        "lowerings/cpu_codegen.py",
        '"fma": "std::fma({0}, {1}, {2})"',
        '"fma": "{0} * {1}"',
        (OPS, "-k", "addcmul"),
    ),
    Mutation(
        "ties of bfloat16 are rounded up",
        "lowerings/cpu_kernel.h",
        "(u + 0x7fff + ((u >> 16) & 1)) >> 16",
        "(u + 0x8000) >> 16",
        ROUNDING,
    ),
    Mutation(
        "a NaN loses against a number",
        "lowerings/cpu_kernel.h",
        "return (a < b || a != a) ? a : b;",
        "return a < b ? a : b;",
        (OPS, "-k", "minimum"),
    ),
    # running
    Mutation(
        "tensors of another layout are not written back",
        "lowerings/cpu_kernel.py",
        "                target.detach().copy_(dense)",
        "                pass",
        ("tests/test_safety_graphs.py", "-k", "another_layout"),
    ),
    Mutation(
        "autograd is not told",
        "lowerings/cpu_kernel.py",
        "torch.autograd.graph.increment_version(tensors)",
        "tensors = None",
        ("tests/test_safety_graphs.py", "-k", "autograd_notices"),
    ),
    Mutation(
        "shared scalars are read after they were written",
        "lowerings/cpu.py",
        "sorted(_written_scalars(groups) & _scalars_read_elsewhere(groups))",
        "[]",
        ("tests/test_capture.py", "-k", "shared_scalars"),
    ),
    Mutation(
        "shared memory is not looked for",
        "lowerings/cpu.py",
        "        self._check_memory(values)",
        "        pass",
        ("tests/test_safety_memory.py", "-k", "own_values and AdamW and foreach"),
    ),
    Mutation(
        "a sum over all parameters is that of the first",
        "lowerings/cpu.py",
        "= math.fsum(part)",
        "= math.fsum(part[:1])",
        ("tests/test_properties_rules.py", "-k", "torch_compile"),
    ),
    # rules and the rewritten graph
    Mutation(
        "steps are counted one too low",
        "trace.py",
        'expr=interpreter.builder.op("add", cell.val.expr, one)',
        "expr=cell.val.expr",
        ("tests/test_backend.py", "-k", "fullgraph and adam"),
    ),
    Mutation(
        "the rewritten graph copies a neighbour's value",
        "rewrite.py",
        "value = graph.call_function(operator.getitem, (node, k * len(group.members) + m))\n                leaf =",
        "value = graph.call_function(operator.getitem, (node, k * len(group.members)))\n                leaf =",
        ("tests/test_rewrite.py", "-k", "one_node or it_runs"),
    ),
    Mutation("the interpreter forgets casts", "ops.py", "return args[0].to(e.dtype)", "return args[0]", ROUNDING),
]
