"""The one Optimizer class that runs every update rule: an eager prelude, then a core that torch.compile captures.

`step` looks at what may change between two steps (closure, hooks, hyperparameters, gradients, storage) in plain Python
and then calls a core that is a single operation. Dynamo captures that core: it sees neither parameters nor floats, so
nothing that a training loop does between two steps can make it recompile, and its cost does not grow with N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import required

from npu_fuse_pass.errors import OptionError, RuleError
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.rules import checkpoint, core_op, hooks
from npu_fuse_pass.rules.declaration import OPTIONS, RESIDUAL, Declaration
from npu_fuse_pass.rules.prelude import Prelude
from npu_fuse_pass.rules.ranges import check_kinds, check_ranges
from npu_fuse_pass.rules.registration import register_backend
from npu_fuse_pass.rules.rehome import Homes, check_option
from npu_fuse_pass.rules.rounding import SEED, check_seed
from npu_fuse_pass.rules.state import States

Settings = Mapping[str, Any]
_TRANSIENT = (
    "_prelude",
    "_ticket",
    "_surface",
    "_core",
    "_call",
    "_under_mode",
    "_homes",
    "step",
    "found_inf",
)  # what no copy takes along
F = TypeVar("F", bound=Callable[..., Any])


_skip_code = find("torch._dynamo.eval_frame.skip_code")


def left_to_python(function: F) -> F:
    """Decorate a function whose own frame stays eager, while what it calls may be captured.

    Not torch.compiler.disable: that would also break the graph of a function which calls it.
    """
    if _skip_code is not None:
        _skip_code(function.__code__)
    return function


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _nothing(msg: str) -> None:
    """Break the graph, without a message."""


end_graph = find("torch._dynamo.graph_break") or _nothing


def eager_prelude(step: F) -> F:
    """Decorate a `step` method: its own frame stays eager, what it calls may be captured by torch.compile.

    torch's schedulers and its profiler hook would wrap `step` in functions that Dynamo then had to trace; the marks set
    here tell them not to, because `RuleOptimizer.step` does their work itself.
    """
    step.hooked = True  # type: ignore[attr-defined]
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return left_to_python(step)


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer whose update is a `Rule`. Subclass it for a named class, or call a Rule to get one.

    Args:
        params: parameters or parameter groups, as torch.optim takes them. A group may hold other keys as well
            (schedulers keep `initial_lr` there): keys that are no hyperparameters have no effect on a step.
        defaults: hyperparameters of the groups; plain Python numbers, which schedulers may change at any time.
        state_dtype: dtype of the states; None means each parameter's own, as in torch.optim. `torch.float32` is
            advisable for half-precision parameters.
        flatten: "params" re-homes the parameters in one buffer per group and dtype, which gives an NPU one tensor to
            update instead of one for each parameter. They become views: `torch.save` of one stores the whole buffer,
            and a reference to a parameter's old memory (`p.data`, `p.detach()`) no longer sees updates.
        master_weights: float16 and bfloat16 parameters keep in a float32 state ("master_residual") what their dtype
            rounds away, so that a step computes with float32 parameters: 8 more bytes of traffic and 4 of memory for
            each element. Others are as without it. What is written to a parameter between steps counts.
        stochastic_rounding: on a CPU, new values of float16 and bfloat16 parameters are rounded up or down by chance,
            the more likely the nearer that is, instead of to nearest: no memory and no traffic besides. The random
            numbers depend on the group's "rounding_seed" (a whole number below 2**32, 0 unless a group says otherwise;
            a state dict has it), the parameter's place in the optimizer, its step and the element. Others are as
            without it.

    Raises:
        OptionError: an option has another value than these, or a parameter cannot be re-homed: it is tied to another
            one, a view of another tensor, a tensor subclass (DTensor) or in a private NPU format. Nothing is changed.
        RuleError: stochastic_rounding=True, and the rule has a hyperparameter "rounding_seed".

    Groups hold plain numbers. `opt.state` is changed as torch.optim's, and the next step goes on from it: entries and
    states may be put in, taken out, exchanged and given other memory; a parameter without states begins anew. Tensors
    in it are views of flat buffers, into which a step copies what was assigned. It refuses (ValueError) a state that
    is not of its parameter's shape, and an entry that lacks some of its states.
    """

    rule: Declaration
    torch_class: type[torch.optim.Optimizer] | None = None  # computes the same from the same options and states
    found_inf: Tensor | None = None
    master_weights = False
    stochastic_rounding = False
    _replaces: str | None = None
    _call: tuple[tuple[Any, ...], dict[str, Any]]  # what hooks make of the arguments of this step

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        check_option(flatten)
        for name, value in (("master_weights", master_weights), ("stochastic_rounding", stochastic_rounding)):
            if not isinstance(value, bool):
                raise OptionError(f"{name}={value!r}: allowed are True and False")
        if master_weights and stochastic_rounding:
            raise OptionError(
                "master_weights=True and stochastic_rounding=True: a residual keeps what rounding takes away, so that "
                "it is to nearest; choose one of them"
            )
        if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
            raise OptionError(f"state_dtype={state_dtype!r}: allowed are None and floating-point torch dtypes")
        self.state_dtype = state_dtype
        self.flatten = flatten
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        if stochastic_rounding:
            if SEED in defaults:
                raise RuleError(
                    f"{type(self).__name__} has a hyperparameter {SEED!r}, where stochastic_rounding has its"
                )
            defaults = {**defaults, SEED: 0}
        super().__init__(params, defaults)
        self.state = States()
        self._start()
        for group in self.param_groups:
            self._check_hooks(group)
            rule = self.rule_for(group)
            for params, settings in self.settings(group):
                check_kinds(rule, settings)
                check_ranges(rule, settings)
                self._check_rounding(group)
                self._prelude.check_once(rule, settings, params)
        self._settle_groups(self.param_groups)

    @classmethod
    def from_rule(cls, rule: Declaration, params: Iterable[Any], hyperparameters: Settings) -> RuleOptimizer:
        """An optimizer for a bare rule; used by calling the rule."""
        options = {k: hyperparameters[k] for k in OPTIONS if k in hyperparameters}
        unknown = sorted(hyperparameters.keys() - rule.defaults.keys() - options.keys())
        if unknown:
            allowed = [*sorted(rule.defaults), *OPTIONS]
            has_no = "has no default for its" if unknown[0] in rule.keywords else "has no"
            raise TypeError(f"{rule.name}() {has_no} hyperparameter {unknown[0]!r}; allowed are {allowed}")
        made = cls.__new__(cls)
        made.rule = rule
        chosen = {k: v for k, v in hyperparameters.items() if k not in options}
        RuleOptimizer.__init__(made, params, {**rule.defaults, **chosen}, **options)
        return made

    # What a subclass may change --------------------------------------------------------------------------------------

    def rule_for(self, group: dict[str, Any]) -> Declaration:
        """The rule of a group; may depend on its options."""
        return self.rule

    def hyperparameters(self, group: dict[str, Any]) -> Settings:
        """What the rule's keywords are looked up in; called at every step."""
        return group

    def partitions(self, group: dict[str, Any]) -> list[tuple[list[Tensor], Settings]]:
        """Parts of a group with settings of their own (which override `hyperparameters`); called at every step."""
        return [(group["params"], {})]

    def before_step(self) -> None:
        """Called at every step, after the closure and before anything is changed."""

    def after_step(self) -> None:
        """Called at every step, when everything is updated."""

    # Stepping --------------------------------------------------------------------------------------------------------

    @eager_prelude
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients; called with gradients enabled. Its value is returned.

        Where the attribute `found_inf` is a tensor that is not zero, nothing is updated and no step is counted
        (mixed precision; compiled as part of a larger function the decision is made on the device).

        Raises:
            TypeError: the closure is not callable.
            GradientError: a gradient is sparse, complex, or of another shape or device than its parameter.
            ValueError: `opt.state` holds what no step can go on from.
        """
        if torch.compiler.is_dynamo_compiling():  # `step` is being inlined into a larger graph
            if closure is not None:
                return self._step_apart(closure)
            reason = core_op.why_apart(self._surface.handle)
            if reason:
                end_graph(msg=core_op.APART.format(reason))
            return self._surface.update(self.found_inf)
        if not self._prelude.compiled:
            self.__dict__["_core"] = core_op.newest.core
        return self._step_with(self._core, closure)

    @left_to_python
    def _step_with(self, core: Callable[[Tensor], None], closure: Callable[[], Any] | None = None) -> Any:
        loss = self._before(closure)
        try:
            if self.found_inf is None or not bool(self.found_inf):
                (core_op.uncompiled_core if self._under_mode else core)(self._ticket)
            self._after()
        except BaseException:
            self._prelude.expose_updated()
            raise
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_apart(self, closure: Callable[[], Any]) -> Any:
        """A step with a closure runs a backward pass, which no graph holds."""
        return self.step(closure)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, closure: Callable[[], Any] | None, in_graph: bool = False) -> Any:
        """Everything ahead of the core. Hooks that only watch see no step that is part of a larger graph."""
        if closure is not None and not callable(closure):
            raise TypeError(f"closure={closure!r} is not callable; pass a function that returns the loss, or None")
        self.__dict__["_call"] = self._run_pre_hooks((closure,) if closure is not None else (), in_graph)
        args, kwargs = self._call
        closure = args[0] if args else kwargs.get("closure")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before_step()
        self._prelude.prepare()
        self.__dict__["_under_mode"] = core_op.under_dispatch_mode()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self) -> None:
        """Everything behind the core."""
        self._prelude.expose_states()
        self._prelude.release_gradients()
        self.after_step()
        for hook in (*hooks.after(self).values(), *hooks.AFTER_ALL.values()):
            hook(self, *self._call)
        self.__dict__["_opt_called"] = True

    # in place of a compiled step, and on the tensors of one, to which it is compared
    _run_original = _run_beside = core_op.run_eager

    @property
    def has_hooks(self) -> bool:
        """True if hooks are registered that run before or after a step."""
        found = (hook for kind in hooks.around(self) for hook in kind.values())
        return any(not getattr(hook, "only_watches", False) for hook in found)

    def _run_pre_hooks(self, args: tuple[Any, ...], in_graph: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs: dict[str, Any] = {}
        for hook in (*hooks.BEFORE_ALL.values(), *hooks.before(self).values()):
            if in_graph and getattr(hook, "only_watches", False):
                continue
            result = hook(self, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(f"{hook} must return None or a tuple of new args and kwargs, got {result!r}")
                args, kwargs = result
        return args, kwargs

    def settings(self, group: dict[str, Any]) -> list[tuple[list[Tensor], Settings]]:
        """Every part of a group with its complete settings."""
        common = self.hyperparameters(group)
        return [(params, {**common, **extra} if extra else common) for params, extra in self.partitions(group)]

    def _start(self) -> None:
        """Fields that are made anew in every process and in every copy."""
        register_backend()
        self._prelude = Prelude(self)
        self._surface = core_op.Surface(self.param_groups, core_op.register(self))
        self._ticket = core_op.make_ticket(self._surface.handle)
        self._core = core_op.newest.core
        self._under_mode = False  # this step is, of dispatch
        self._homes = Homes()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in torch.optim; they may already have gradients.

        Raises:
            RuleError: a hyperparameter is of another kind than its default, or outside of its range.
            OptionError: flatten="params", and one of them cannot be re-homed. Nothing is changed then.
        """
        if "_surface" in self.__dict__ and isinstance(param_group, dict):
            self._check_group(param_group)
        super().add_param_group(param_group)
        if "_surface" in self.__dict__:
            try:
                self._settle_groups(self.param_groups[-1:])
            except OptionError:
                self.param_groups.pop()
                raise

    def complete(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group with the defaults of what it lacks, as far as there are any."""
        return {name: value for name, value in {**self.defaults, **group}.items() if value is not required}

    def _check_hooks(self, group: dict[str, Any]) -> None:
        """Refuse a class whose rule or hooks are of another kind than steps need."""
        name, has_rule = type(self).__name__, hasattr(self, "rule") or type(self).rule_for is not RuleOptimizer.rule_for
        rule = self.rule_for(group) if has_rule else None
        if not isinstance(rule, Declaration):
            what = getattr(rule, "__name__", rule)
            raise RuleError(f"the rule of {name} is {what!r}; allowed is what the decorator npu_fuse_pass.rule makes")
        if not isinstance(found := self.hyperparameters(group), Mapping):
            raise RuleError(f"{name}.hyperparameters gives {found!r}; allowed is a dict of hyperparameters")
        parts: Any = self.partitions(group)
        for part in parts if isinstance(parts, Iterable) else [parts]:
            params, own = part if isinstance(part, tuple) and len(part) == 2 else (None, None)
            if not isinstance(params, (list, tuple)) or not isinstance(own, Mapping):
                allowed = "allowed is a list of (list of parameters, dict)"
                raise RuleError(f"{name}.partitions gives {part!r:.80}; {allowed}")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Refuse hyperparameters that no step can use."""
        complete = self.complete(group)
        for check in (check_kinds, check_ranges):
            check(self.rule_for(complete), self.hyperparameters(complete))
        self._check_rounding(complete)

    def _check_rounding(self, group: Mapping[str, Any]) -> None:
        if self.stochastic_rounding:
            check_seed(group)

    def _settle_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        if self.flatten is not None:
            self.settle([params for group in groups for params, _ in self.settings(group)])

    def settle(self, lists: Iterable[Sequence[Tensor]]) -> None:
        """Re-home parameters, in one buffer for each list of them (and dtype) where they are not adjacent already.

        Raises:
            OptionError: one of them cannot be re-homed; nothing is changed.
        """
        self._homes.settle(lists, [p for group in self.param_groups for p in group["params"]])

    # Saving and loading ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's layout and names.

        As torch's, its tensors share the memory of the states and follow the next steps; deepcopy it to keep values.
        They are views of buffers that many parameters share: `npu_fuse_pass.compact` gives every tensor memory of its
        own. "step" is a float32 copy. Groups also have torch's options that our class lacks, at torch's defaults.
        """
        first_hook = self.register_state_dict_post_hook(lambda _, packed: self._shown(packed), prepend=True)
        try:
            return super().state_dict()
        finally:
            first_hook.remove()

    def _shown(self, packed: dict[str, Any]) -> dict[str, Any]:
        """What the user's hooks see of a state dict, which they may change."""
        others = {} if self.torch_class is None else checkpoint.torch_options(self.torch_class)
        return {
            "state": {k: checkpoint.aliases(entry) for k, entry in packed["state"].items()},
            "param_groups": [{**others, **group} for group in packed["param_groups"]],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this or a torch.optim optimizer; values are copied into the flat buffers.

        Hyperparameters that a saved group lacks keep the defaults that this optimizer was made with.

        Raises:
            ValueError: the groups do not fit, a hyperparameter is of another kind than its default (or outside of its
                range), or the states of a parameter lack one, are another optimizer's or of a wrong kind or shape;
                nothing is changed.
        """
        last_hook = self.register_load_state_dict_pre_hook(lambda _, given: self._admitted(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()

    def saved_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group of a checkpoint as it is taken over; an error if no step can use it. Nothing is changed yet."""
        complete = self.complete(group)
        self._check_group({name: value for name, value in complete.items() if name != "params"})
        return complete

    def _admitted(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What the user's hooks have made of a state dict, checked and sealed."""
        checked = {**state_dict, "param_groups": [self.saved_group(group) for group in state_dict["param_groups"]]}
        self._check_saved(checked)
        return checkpoint.sealed(checked)

    def _check_saved(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse saved states from which no step could go on."""
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            return  # which torch refuses
        for given, group in zip(saved, self.param_groups, strict=True):
            indices = {id(p): index for p, index in zip(group["params"], given["params"], strict=True)}
            complete = {**given, "params": group["params"]}
            rule = self.rule_for(complete)
            for params, settings in self.settings(complete):
                for p in params:
                    index = indices[id(p)]
                    checkpoint.check_saved(rule, settings, p, state_dict["state"].get(index, {}), f"parameter {index}")

    def __getstate__(self) -> dict[str, Any]:
        # without hooks, as torch.optim's copies: what they hold belongs to the original
        held = [k for k in self.__dict__ if k.startswith("_optimizer_") and k.endswith("_hooks")]
        fields = {k: v for k, v in self.__dict__.items() if k not in (*_TRANSIENT, *held)}
        state = {p: checkpoint.copied(entry) for p, entry in self.state.items()}
        child: Any = get_spawning_popen()
        if child is not None:  # tensors go to it as open files, which close with the last reference
            child.kept = (*getattr(child, "kept", ()), state)
        return {**fields, "state": state}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        state = {p: self._unsealed(p, entry) for p, entry in fields["state"].items()}
        super().__setstate__({**fields, "state": States(state)})
        if "_prelude" not in self.__dict__:
            self._start()
        self._surface.groups = self.param_groups

    def __copy__(self) -> Any:
        """As copy.copy of torch's: another optimizer over the same groups and states."""
        made = type(self).__new__(type(self))
        made.__setstate__(self.__getstate__())
        made.state = self.state
        return made

    def _unsealed(self, param: Any, entry: Any) -> Any:
        """A loaded entry, with its tensors where the parameter is and in the dtype that states are stored in."""
        if not isinstance(entry, Mapping):
            return entry
        opened = {
            name: self._stored(name, param, v.tensor) for name, v in entry.items() if isinstance(v, checkpoint.Sealed)
        }
        return {**entry, **opened}

    def _stored(self, name: str, param: Any, value: Tensor) -> Tensor:
        # copies: another optimizer may go on with the tensors of a checkpoint that was not saved in between
        if name == "step" or not isinstance(param, Tensor):
            return value.clone()
        dtype = torch.float32 if name == RESIDUAL else self.state_dtype or param.dtype
        return value.to(dtype=dtype if param.is_floating_point() else None, device=param.device, copy=True)

    @left_to_python
    def __setattr__(self, name: str, value: Any) -> None:
        """As usual, outside of a graph. Dynamo would lose it: it assigns nothing to an optimizer's attributes."""
        if torch.compiler.is_dynamo_compiling():
            end_graph(msg=f"npu_fused: opt.{name} is assigned here, which Python has to do")
        super().__setattr__(name, value)
        if name == "param_groups" and "_surface" in self.__dict__:
            self._surface.groups = value
