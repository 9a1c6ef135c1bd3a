"""Planted bugs on the rules' side: storage, prelude, the step's operation, the optimizer. See mutations.py."""

from __future__ import annotations

from tests.support.mutations import Mutation


def _equal(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/behaviour/test_equal_shapes.py::test_{name}" for name in names)


def _rounding(name: str) -> tuple[str, ...]:
    return (f"tests/unit/tensors/test_stochastic_rounding.py::test_{name}",)


STATES = _equal("states_are_those_of_their_parameters[compiled-Adam]")
EAGER = _equal("states_are_those_of_their_parameters[eager-Adam]")
CHECKPOINT = _equal("a_checkpoint_of_torchs[eager-Adam]")
FIRST = _equal("a_first_step_without_some_gradients[eager-Adam]")

RULES = [
    # storage
    Mutation("all states begin in one place", "views_of", "offset += p.numel()", "offset += 0", STATES),
    Mutation(
        "two parameters of one shape exchange their states",
        "Batch.states",
        "return {name: views[index] for",
        "return {name: views[{0: 1, 1: 0}.get(index, index)] for",
        STATES,
    ),
    Mutation(
        "a parameter shows its neighbour's counter",
        "_show",
        "batch.step_views[index]",
        "batch.step_views[index - 1]",
        FIRST,
    ),
    Mutation(
        "a checkpoint's states go to the parameter before",
        "adopt",
        "_bring(list(map(local_part, batch.owners, known)),",
        "_bring(list(map(local_part, batch.owners, [known[1], known[0], *known[2:]])),",
        CHECKPOINT,
    ),
    Mutation("counters begin anew at a checkpoint", "adopt", "view.fill_(step)", "view.fill_(0)", CHECKPOINT),
    Mutation(
        "a parameter that begins anew keeps its state",
        "_bring",
        "            view.fill_(fill)",
        "            pass",
        _equal("states_begin_where_the_rule_says[eager]"),
    ),
    Mutation(
        "a parameter without a gradient counts a step",
        "updated_first",
        "if grad is not None and not batch.seen[i]]",
        "if not batch.seen[i]]",
        FIRST,
    ),
    # stochastic rounding
    Mutation(
        "every group rounds with seed 0",
        "Rounding.fill",
        "self._numbers[0] = float(seed)",
        "self._numbers[0] = 0.0",
        _rounding("groups_and_missing_gradients"),
    ),
    Mutation(
        "all parameters are rounded by the same random bits",
        "Rounding.place",
        "[numbers[id(p)] for p in owners]",
        "[0 for p in owners]",
        _rounding("eager_steps_are_those_of_the_reference[torch.bfloat16-sgd]"),
    ),
    Mutation(
        "every chunk is rounded by the random bits of the first",
        "_Function._noise",
        "int64_t({first}) + start",
        "int64_t({first})",
        _rounding("threads_and_chunks[torch.float16]"),
    ),
    Mutation(
        "elements are counted in a gradient's order",
        "Kernel._bind_by_member",
        "[values[member[slot]] for slot in self._counted] or tensors",
        "[values[member[c.slot]] for c in self._columns if not c.written]",
        _rounding("memory_in_another_order"),
    ),
    Mutation(
        "without states every step is rounded by the same random bits",
        "make_batch",
        "bool(flat or rounding.names)",
        "bool(flat)",
        _rounding("resumed_runs_go_on_bit_for_bit[loaded]"),
    ),
    # the prelude
    Mutation(
        "the gradients of the step before are taken again",
        "_read_gradients",
        "    batch.forget_gradients()\n",
        "",
        EAGER,
    ),
    Mutation(
        "a parameter that is thawed is never updated",
        "Prelude._fit",
        "any(p.grad is not None for p in self._outside)",
        "False",
        _equal("a_parameter_that_is_thawed[eager-SGD]"),
    ),
    Mutation(
        "every group has the numbers of the first",
        "Prelude._fit",
        "fill_hyper(b, parts[b.part].settings)",
        "fill_hyper(b, parts[0].settings)",
        _equal("numbers_of_groups[eager-Adam]"),
    ),
    Mutation(
        "a gradient of any kind is taken",
        "Prelude._make",
        "                    check_gradient(p, p.grad)",
        "                    pass",
        ("tests/behaviour/test_bad_input.py::test_wrong_gradients[first step-complex-eager-adam]",),
    ),
    # the step's operation
    Mutation(
        "an eager step counts from zero",
        "_run_rules",
        "step = batch.step_views[i] + 1",
        "step = batch.step_views[i] + 0",
        EAGER,
    ),
    Mutation(
        "an eager step forgets what it made of the states",
        "_run_rules",
        "[(param, new), *((states[name], value) for name, value in new_states.items())]",
        "[(param, new)]",
        EAGER,
    ),
    Mutation(
        "a total of a group is that of the optimizer",
        "_total",
        "everywhere or b.group == batch.group",
        "True",
        _equal("totals_are_over_what_they_say[eager-group]"),
    ),
    # the optimizer
    Mutation(
        "a step with an infinite gradient is made",
        "RuleOptimizer._step_with",
        "if self.found_inf is None or not bool(self.found_inf):",
        "if True:",
        _equal("found_inf[eager-SGD]"),
    ),
    Mutation(
        "what a hook gives is not taken",
        "RuleOptimizer._run_pre_hooks",
        "                args, kwargs = result",
        "                pass",
        _equal("hooks_are_given_what_a_step_is_given"),
    ),
    Mutation(
        "a pickled state shares memory with the optimizer",
        "copied",
        "lambda t: t.detach().clone()",
        "lambda t: t",
        ("tests/behaviour/test_state_mapping.py::test_copies_are_plain",),
    ),
]
