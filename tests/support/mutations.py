"""Planted bugs: each is one replacement in the package, and the tests that have to notice it.

A place is named by its function, so that files can move. Texts are those of the code as it is: a mutation whose old
text is gone fails, and is written anew for the new code.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A planted bug.

    Args:
        place: the function, method or module-level name that holds it ("Kernel.write"), or "C++".
        old, new: what is replaced (it occurs once there) and by what.
        tests: ids of tests, of which the first that fails is enough; all pass without the bug.
    """

    name: str
    place: str
    old: str
    new: str
    tests: tuple[str, ...]


def _operation(*names: str) -> tuple[str, ...]:
    return tuple(
        f"tests/unit/capture/test_ops_table.py::test_an_operation_is_torchs[{name}-torch.float64]" for name in names
    )


def _small(name: str) -> tuple[str, ...]:
    return (f"tests/behaviour/test_small_steps.py::test_{name}",)


def _check(name: str) -> tuple[str, ...]:
    return (f"tests/unit/lowerings/test_input_check.py::test_{name}",)


def _cache(name: str) -> tuple[str, ...]:
    return (f"tests/unit/lowerings/test_kernel_cache.py::test_{name}",)


ORDER = ("tests/unit/capture/test_capture.py::test_what_is_read_is_the_value_of_that_moment",)
ROUNDING = ("tests/behaviour/test_safety_half.py::test_rounds_after_every_operation[torch.bfloat16]",)
ONE_GROUP = ("tests/unit/passes/test_group.py::test_parameters_are_one_group_in_any_order",)
REDUCED = ("tests/unit/capture/test_ops_shaped.py::test_reductions_are_those_of_float64[torch.float32]",)
CHANGES = "tests/behaviour/test_backend_changes.py"
BETWEEN_STEPS = "tests/behaviour/test_safety_graphs.py::test_what_a_training_loop_does_between_steps"

MUTATIONS = [
    # what operations compute
    Mutation(
        "add forgets alpha",
        "_add",
        'return b.op("add", x, y) if _is(alpha, 1) else b.op("fma", y, alpha, x)',
        'return b.op("add", x, y)',
        _operation("add alpha"),
    ),
    Mutation(
        "sub adds alpha times",
        "_sub",
        'b.op("fma", y, b.op("neg", alpha), x)',
        'b.op("fma", y, alpha, x)',
        _operation("sub alpha"),
    ),
    Mutation(
        "lerp goes the other way",
        "_lerp",
        'distance = b.op("sub", end, start)',
        'distance = b.op("sub", start, end)',
        _operation("lerp"),
    ),
    Mutation(
        "a square is a double",
        "_POWERS",
        '    2.0: lambda b, x: b.op("mul", x, x),',
        '    2.0: lambda b, x: b.op("add", x, x),',
        _operation("pow 2"),
    ),
    Mutation(
        "half precision rounds once at the end",
        "evaluate",
        "return Val(b.cast(result, dtype) if dimmed and dtype.is_floating_point else result, dtype, shape)",
        "return Val(result, dtype, shape)",
        ROUNDING,
    ),
    Mutation("a mean is a sum", "_mean", "b.numel() if x.shape else b.const(1)", "b.const(1)", REDUCED),
    # capture
    Mutation(
        "a list operation takes the first entry of a list",
        "Interpreter._foreach",
        "given = x[i] if isinstance(x, (list, tuple)) else x",
        "given = x[0] if isinstance(x, (list, tuple)) else x",
        ("tests/unit/passes/test_group.py::test_members_that_interleave_their_operations",),
    ),
    Mutation(
        "an alias is a copy",
        "Interpreter.call",
        "return args[0]  # torch returns the tensor itself: what is written through it reaches the leaf",
        "return Cell(result)",
        ORDER,
    ),
    Mutation(
        "what is written is not rounded to the tensor's dtype",
        "Interpreter._write",
        "expr = self.builder.cast(result.expr, cell.val.dtype)",
        "expr = result.expr",
        ROUNDING,
    ),
    Mutation(
        "equal operations on different leaves are one",
        "Builder.make",
        "key = (op, tuple(sorted(ids) if op in COMMUTATIVE else ids), value, dtype, tensor)",
        "key = (op, tuple(sorted(ids) if op in COMMUTATIVE else ids), dtype, tensor)",
        ORDER,
    ),
    Mutation(
        "writes of one parameter are updates of their own",
        "_Together._join_tensors",
        "                    self._sets.join(other, first)",
        "                    pass",
        ONE_GROUP,
    ),
    Mutation(
        "parameters that share a counter are one update",
        "_Together._join_scalars",
        "                if len(others) == 1 and (other",
        "                if others and (other",
        _small("a_counter_that_several_parameters_read_joins_none_of_them"),
    ),
    # grouping
    Mutation(
        "all constants are the first one",
        "_groups.extra_leaf",
        "key = (leaf.kind, leaf.name)",
        "key = (leaf.kind, '')",
        ("tests/unit/passes/test_group.py::test_numbers_are_kept_apart_and_dtypes_are_groups",),
    ),
    Mutation(
        "the order of arguments matters",
        "_structure",
        "            below.sort()",
        "            below.reverse()",
        _small("operands_of_sums_and_products_may_be_swapped_everywhere"),
    ),
    Mutation(
        "differences commute",
        "COMMUTATIVE",
        'COMMUTATIVE = ("add",',
        'COMMUTATIVE = ("sub", "add",',
        _small("operands_of_differences_and_quotients_may_not"),
    ),
    Mutation(
        "the order of writes is that of the program",
        "_canonicalise",
        "writes = sorted(update.writes, key=lambda w: keys[id(w[1])])",
        "writes = list(update.writes)",
        _small("states_may_be_written_in_any_order"),
    ),
    # code generation
    Mutation(
        "the last element of every chunk is left out",
        "_Function._sweep",
        "end = chunk + (left < {CHUNK} ? left : {CHUNK});",
        "end = chunk + (left < {CHUNK} ? left : {CHUNK}) - 1;",
        _small("every_element_is_written_whatever_the_size"),
    ),
    Mutation(
        "a maximum starts at zero", "_NEUTRAL", '"amax": "-INFINITY"', '"amax": "0.0"', _small("extremes_of_one_sign")
    ),
    Mutation(
        "a reduction leaves out what fills no lane",
        "_Function._lanes",
        "for (int l = 0; base + l < n; ++l) {",
        "for (int l = 0; base + l + 1 < n; ++l) {",
        REDUCED,
    ),
    Mutation(
        "fma is a product", "CPP", '"fma": "math::fma({0}, {1}, {2})"', '"fma": "{0} * {1}"', _operation("addcmul")
    ),
    Mutation(
        "ties of bfloat16 are rounded up", "C++", "((u + 0x7fff + ((u >> 16) & 1)) &", "((u + 0x8000) &", ROUNDING
    ),
    Mutation(
        "rounding carries into the sign of a NaN",
        "C++",
        "return x != x ? T(NAN) : x;",
        "return x;",
        ("tests/unit/capture/test_ops_shaped.py::test_casts_round_as_torchs_do[torch.float32]",),
    ),
    Mutation(
        "sums of a few values are left out",
        "_Function._lanes",
        'f"add_exact(r{j}[l], e{j}[l], b{j}[l]); b{j}[l] = 0;"',
        'f"b{j}[l] = 0;"',
        REDUCED,
    ),
    Mutation(
        "a power is that of the member before",
        "C++",
        "if (!known || memcmp(given, args, sizeof(args))) {",
        "if (!known) {",
        _check("what_changes_between_steps_is_noticed[gradient_missing]"),
    ),
    Mutation(
        "a NaN loses against a number",
        "C++",
        "const T m = a < b ? a : b; return a != a ? a : m;",
        "return a < b ? a : b;",
        _operation("minimum"),
    ),
    # running
    Mutation(
        "tensors of another layout are not written back",
        "Kernel.finish",
        "                target.detach().copy_(dense)",
        "                pass",
        (f"{BETWEEN_STEPS}[another_layout-SGD]",),
    ),
    Mutation(
        "autograd is not told",
        "Kernel.write",
        "torch.autograd.graph.increment_version(tensors)",
        "tensors = None",
        ("tests/behaviour/test_safety_graphs.py::test_autograd_notices_that_a_parameter_was_written[Lion-(5,)]",),
    ),
    Mutation(
        "shared scalars are read after they were written",
        "Program.__init__",
        "sorted(_written_scalars(groups) & _scalars_read_elsewhere(groups))",
        "[]",
        _small("a_counter_that_several_parameters_read_joins_none_of_them"),
    ),
    Mutation(
        "shared memory is not looked for",
        "Program.__call__",
        "            self._check_memory(values)",
        "            pass",
        ("tests/behaviour/test_safety_memory.py::test_gradients_that_share_memory[own_values-AdamW foreach]",),
    ),
    Mutation(
        "a sum over all parameters is that of the first",
        "Program._add_totals",
        "= math.fsum(part)",
        "= math.fsum(part[:1])",
        _small("a_rule_counts_from_one_and_sums_over_all_parameters"),
    ),
    Mutation(
        "memory that has moved is not checked again",
        "Kernel._enter",
        "self.moved |= column.written",
        "pass",
        _check("parameters_that_come_to_overlap_are_refused"),
    ),
    Mutation(
        "a number that changes in place stays as it was",
        "Hyper.fill",
        "given if all(map(_immutable, given)) else None",
        "given",
        (f"{CHANGES}::test_numbers_that_change_in_place[lr]",),
    ),
    # the native check of a step's tensors
    Mutation(
        "negated tensors look the same",
        "C++",
        "t->key_set() != keys || ",
        "",
        _check("what_changes_between_steps_is_noticed[gradient_negated]"),
    ),
    Mutation(
        "a transposed parameter looks the same",
        "C++",
        "!t->strides().equals(strides)",
        "false",
        _check("what_changes_between_steps_is_noticed[laid_out_otherwise]"),
    ),
    Mutation(
        "who was left out of a refused step stays out",
        "Kernel.same",
        "self._bound and self._all_active  #",
        "True  #",
        _check("what_changes_between_steps_is_noticed[refused]"),
    ),
    Mutation(
        "memory that was given back looks the same",
        "C++",
        " || storage->nbytes() < before + bytes",
        "",
        _check("memory_given_back_under_a_tensor_is_not_touched"),
    ),
    Mutation(
        "a dict that holds something else looks the same",
        "C++",
        "own && word(i, VERSION) == versions[i]",
        "own",
        _check("a_dict_that_holds_something_else_is_another[0-True]"),
    ),
    Mutation(
        "states are taken from their owner",
        "put_in_order",
        "_owners(entry, name) == alone",
        "True",
        ("tests/unit/capture/test_stock_road.py::test_states_that_something_else_holds_stay[a view]",),
    ),
    Mutation(
        "every gradient looks the same",
        "C++",
        " || !table.kinds[table.known[i].kind].find(t->unsafeGetTensorImpl(), at)) return false;",
        ") return false;\n    at = t->mutable_data_ptr();",
        _check("what_changes_between_steps_is_noticed[gradient_apart]"),
    ),
    Mutation(
        "what one share of a check sees is forgotten at the next",
        "C++",
        "/ parts) && good;",
        "/ parts);",
        _check("a_check_has_fewer_threads_than_it_asks_for"),
    ),
    Mutation(
        "autograd is not told what was written",
        "C++",
        "table.now[i]->bump_version();",
        ";",
        _check("every_optimizer_is_checked[adam]"),
    ),
    # what is kept on disk, and for how long in memory
    Mutation(
        "whatever looks like a library is cleared",
        "clear_cache",
        "_LIBRARY.fullmatch(path.name)",
        'path.name.endswith(".so")',
        _cache("clear_cache_removes_what_is_ours_and_nothing_else"),
    ),
    Mutation(
        "what killed builds left stays",
        "_remove_builds",
        "path.lstat().st_mtime <= before",
        "path.lstat().st_mtime > before",
        _cache("what_killed_builds_left_is_removed"),
    ),
    Mutation(
        "folders above the cache may be anybody's",
        "_check_safe",
        "not sticky and (last or reachable)",
        "not sticky and last",
        _cache("a_folder_that_others_may_replace[mine/deeper]"),
    ),
    Mutation(
        "a deleted optimizer's plan stays",
        "RuleStep._drop",
        "        self._gone()",
        "        pass",
        ("tests/unit/run/test_backend_lifetime.py::test_a_deleted_optimizer_takes_its_plan_along[adam]",),
    ),
    Mutation(
        "a loaded state is rounded to the parameter's dtype",
        "RuleOptimizer._stored",
        "else self.state_dtype or param.dtype",
        "else param.dtype",
        (
            "tests/behaviour/test_resume.py::test_a_resumed_run_is_the_uninterrupted_one[torch.bfloat16-torch.float32-adam]",
        ),
    ),
    # rules and the rewritten graph
    Mutation(
        "steps are counted one too low",
        "_trace",
        'expr=b.op("add", step.val.expr, b.const(1))',
        "expr=step.val.expr",
        _small("a_rule_counts_from_one_and_sums_over_all_parameters"),
    ),
    Mutation(
        "the rewritten graph copies a neighbour's value",
        "_Rewriting._add_groups",
        "value = self._call(operator.getitem, (node, k * len(group.members) + m))\n                    leaf =",
        "value = self._call(operator.getitem, (node, k * len(group.members)))\n                    leaf =",
        ("tests/unit/passes/test_rewrite.py::test_it_runs_and_gives_what_the_step_gives",),
    ),
    Mutation("the interpreter forgets casts", "_value", "return args[0].to(e.dtype)", "return args[0]", ROUNDING),
]
