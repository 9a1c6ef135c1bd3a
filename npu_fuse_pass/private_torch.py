"""Private names of torch, which a later torch may drop: all are looked up here, and none of them has to be there.

Code that uses one has a fallback, or gives a reason that names it. What was looked for in vain stands in the log and in
every report.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from typing import TYPE_CHECKING, Any

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.reasons import Code

_log = logging.getLogger("npu_fuse_pass")

WITHOUT = {
    "torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors": "Python checks a step's tensors, about 1 us for each",
    "torch._C._dynamo.guards.TensorGuards": "a step's tensors are compared one by one, about 0.4 us for each",
    "torch._C._profiler._RecordFunctionFast": "profiles get a kernel's name by torch.profiler.record_function, some us "
    "for each call",
    "torch._C._storage_Use_Count": "states that torch.optim's classes make lie apart, and steps take longer",
    "torch._dynamo.callback.callback_handler": "nobody says that torch hides a step",
    "torch._dynamo.config.capture_scalar_outputs": "a number that item() reads ends the graph",
    "torch._dynamo.config.disable": "a step that TORCH_COMPILE_DISABLE=1 leaves eager counts as not captured",
    "torch._dynamo.config.do_not_emit_runtime_asserts": "Dynamo refuses some quotients of numbers that item() reads",
    "torch._dynamo.config.patch": "a number that item() reads ends the graph",
    "torch._dynamo.config.recompile_limit": "reports of recompiles do not say where torch stops",
    "torch._dynamo.config.use_numpy_random_stream": "numpy.random draws from torch's generator in compiled code",
    "torch._dynamo.convert_frame": "numbers that change may compile a captured step at every step",
    "torch._dynamo.convert_frame._compile": "numbers that change may compile a captured step at every step",
    "torch._dynamo.eval_frame": "what torch.compile gave is compiled as it is",
    "torch._dynamo.eval_frame._stance": "a step that torch.compiler.set_stance leaves eager counts as not captured",
    "torch._dynamo.eval_frame.skip_code": "Dynamo captures a rule optimizer's step with all parameters; with "
    "step hooks it runs as the original",
    "torch._dynamo.exc.InternalTorchDynamoError": "a step on which Dynamo fails raises its error",
    "torch._dynamo.exc.TorchRuntimeError": "a step on which Dynamo fails raises its error",
    "torch._dynamo.graph_break": "a graph that has to end does not say why",
    "torch._dynamo.guards": "a function that removes states of torch.optim's optimizer may mix up the others",
    "torch._dynamo.guards.GuardBuilder.CONSTANT_MATCH": "a full deque of the step has one item more in its graph",
    "torch._dynamo.guards.GuardBuilder.DUPLICATE_INPUT": "parameters that had one gradient keep it in a compiled step",
    "torch._dynamo.guards.install_guard": "parameters that had one gradient keep it in a compiled step",
    "torch._dynamo.guards.is_from_optimizer_source": "a function that removes states of torch.optim's "
    "optimizer may mix up the others",
    "torch._dynamo.guards.match_on_id_for_tensor": "new gradients may compile a captured step at every step",
    "torch._dynamo.output_graph.OutputGraph": "what a step has read as p.data is what it assigns to it later",
    "torch._dynamo.output_graph.OutputGraph.compile_subgraph": "what a step has read as p.data is what it assigns "
    "to it later",
    "torch._dynamo.pgo.auto_dynamic": "numbers that change may compile a step twice",
    "torch._dynamo.register_backend": 'backend="npu_fused" is known by the entry point of the installed package',
    "torch._dynamo.reset_code": "Dynamo keeps what stands around the trace of a rule",
    "torch._dynamo.source.AttrSource": "a class without capturable may be compiled twice",
    "torch._dynamo.source.OptimizerSource": "a step in a function has its own graph",
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx": "a step in a function has its own graph",
    "torch._dynamo.symbolic_convert.InstructionTranslatorBase": "f-strings of numbers that change "
    "fail, or lose their format",
    "torch._dynamo.symbolic_convert.InstructionTranslatorBase._format_value": "f-strings of numbers that change "
    "fail, or lose their format",
    "torch._dynamo.utils": "a step that lifts torch's limit of compiles by itself is compiled in parts",
    "torch._dynamo.utils.counters": "messages do not say why Dynamo ended a graph",
    "torch._dynamo.utils.get_debug_dir": "dumps under TORCH_COMPILE_DEBUG=1 go to torch_compile_debug",
    "torch._dynamo.utils.get_metrics_context": "reports do not say why a step was compiled again",
    "torch._dynamo.utils.graph_break_reasons": "messages do not say where Dynamo ended a graph",
    "torch._dynamo.variables.ConstantVariable": "f-strings of numbers that change fail, or lose their format",
    "torch._dynamo.variables.LazyVariableTracker": "a class without capturable may be compiled twice",
    "torch._dynamo.variables.NewGlobalVariable": "a step behind a change in a function has its own graph",
    "torch._dynamo.variables.OptimizerVariable": "a class without capturable may be compiled twice",
    "torch._dynamo.variables.OptimizerVariable._set_capturable": "a class without capturable may be compiled twice, "
    "and a group that a function changes becomes capturable",
    "torch._dynamo.variables.OptimizerVariable.call_method": "what a function changes ahead of a step of Muon, "
    "or of another whose _init_group makes states, is lost",
    "torch._dynamo.variables.OptimizerVariable.create_finalizer": "parameters that had one gradient keep it in a "
    "compiled step",
    "torch._dynamo.variables.OptimizerVariable.var_getattr": "attributes of an optimizer whose names are part of "
    "_init_group are taken for that",
    "torch._dynamo.variables.SymNodeVariable": "f-strings of numbers that change fail, or lose their format",
    "torch._dynamo.variables.TensorVariable": "what a step has read as p.data is what it assigns to it later",
    "torch._dynamo.variables.TensorVariable.call_method": "del p.grad in a compiled function is lost",
    "torch._dynamo.variables.TensorVariable.var_getattr": "what a step has read as p.data is what it assigns "
    "to it later",
    "torch._dynamo.variables.VariableTracker.build": "del p.grad in a compiled function is lost",
    "torch._dynamo.variables.VariableTracker": "a class without capturable may be compiled twice",
    "torch._dynamo.variables.builder": "numbers that change may compile a step twice",
    "torch._dynamo.variables.builder.VariableBuilder": "what a function assigns to attributes of torch.optim's "
    "optimizers is lost",
    "torch._dynamo.variables.builder.VariableBuilder._wrap": "what a function assigns to attributes of torch.optim's "
    "optimizers is lost",
    "torch._dynamo.variables.builder.VariableBuilder.wrap_user_defined": "a random.Random of the step draws the same "
    "numbers at every call",
    "torch._dynamo.variables.builder.process_automatic_dynamic": "numbers that change may compile a step twice",
    "torch._foreach_copy_": "lists of tensors are copied one by one",
    "torch._guards.CompileContext.current_compile_id": "reports do not say why a step was compiled again; with plain "
    "torch.compile, numbers that change may compile a step at every step",
    "torch._guards.TracingContext": "NPU steps run as the original; a rule is traced in a compile of its own",
    "torch._guards.TracingContext.extract_stack": "reports do not say where a compiled function calls the step",
    "torch._guards.tracing": "NPU steps run as the original",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "Inductor keeps no graph that fuse_pass has changed",
    "torch._inductor.inductor_prims": "torchair converts no prims.fma",
    "torch._logging._internal": "tlparse shows no reports",
    "torch._prims_common.is_non_overlapping_and_dense": "torch.empty_like says how a result lies in memory",
    "torch._prims_common.is_non_overlapping_and_dense_or_false": "an older form is asked how a result lies in memory",
    "torch._subclasses.fake_tensor.DataDependentOutputException": "math.log1p and its like of a number that "
    "item() reads keep its first value",
    "torch._subclasses.fake_tensor.FakeTensor": "NPU steps run as the original",
    "torch._subclasses.fake_tensor.FakeTensorMode": "update rules cannot be traced: steps run as the original",
    "torch._sym_log2": "math.log of a number that changes from step to step compiles the step anew",
    "torch.autograd._profiler_enabled": "explain does not measure a script's own steps; a compiled step takes some us "
    "longer",
    "torch.utils._foreach_utils._group_tensors_by_device_and_dtype": "clipping and step have a graph each",
    "torch.utils._mode_utils.no_dispatch": "NPU steps run as the original",
    "torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals": "an older form is asked for modes",
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode": "no step is compiled after one under a dispatch mode",
    "torch.Tensor._is_zerotensor": "a tensor of zeros without memory is refused by its address",
    "torch.Tensor._use_count": "states that torch.optim's classes make lie apart, and steps take longer",
    "torch.Tensor._version": "a rule that changes its arguments is not refused at once; on an NPU a step reads 0-dim "
    "tensors each time",
    "torch.UntypedStorage._cdata": "storages are told apart by their Python objects",
    "torch._dynamo.convert_frame.ConvertFrame._torchdynamo_orig_backend": "nobody says that torch hides a step",
    "torch._dynamo.eval_frame.OptimizeContext._torchdynamo_orig_callable": "what torch.compile gave is compiled "
    "as it is, and schedulers refuse it in the place of opt.step",
    "torch._dynamo.metrics_context.MetricsContext._metrics": "reports do not say why a step was compiled again",
    "torch._dynamo.side_effects.SideEffects._get_modified_vars": "a step in a function has its own graph",
    "torch._ops.OpOverload._schema": "what an operation writes is told by its name; operations that no kernel computes "
    "leave the step as the original",
    "torch.distributed.fsdp.FlatParameter._fsdp_flattened": "a rule that takes norms is not refused for parameters of "
    "FSDP1, which are parts of flat tensors",
    "torch.distributed.tensor.DTensor._local_tensor": "to_local() makes a DTensor's local part anew at each step",
    "torch.optim.Optimizer._init_group": "Dynamo captures steps of torch.optim operation by operation",
    "torch.optim.Optimizer._opt_called": "nothing: it is written for schedulers, and never read",
    "torch.optim.Optimizer._optimizer_step_post_hooks": "a hook's handle says where torch keeps them",
    "torch.optim.Optimizer._optimizer_step_pre_hooks": "a hook's handle says where torch keeps them",
    "torch.optim.Optimizer._step_supports_amp_scaling": "nothing: it is written for GradScaler, and never read",
    "torch.optim.Optimizer._wrapped_by_lr_sched": "nothing: it is written for schedulers, and never read",
    "torch.utils._python_dispatch.TorchDispatchMode": "rules are traced for every shape, and operations that no kernel "
    "computes leave the step as the original",
}
"""Name -> what happens on a torch without it."""

_looked_for: dict[str, None] = {}
_owner = functools.cache(pkgutil.resolve_name)  # some names are asked for at every step


def find(*names: str) -> Any:
    """The object of the first of these names that this torch has; None, logged once, if it has none of them."""
    for name in names:
        try:
            return _resolved(name)
        except (ImportError, AttributeError):
            continue
    if names[0] not in _looked_for:
        _looked_for[names[0]] = None
        _log.warning("npu_fused: %s", _lacking(names[0]))
    return None


def _resolved(name: str) -> Any:
    owner, _, last = name.rpartition(".")
    try:
        return getattr(_owner(owner), last)
    except AttributeError:
        return pkgutil.resolve_name(name)  # a module that is not imported yet


def need(name: str) -> Any:
    """The object of this name.

    Raises:
        Unsupported: this torch has no such name.
    """
    found = find(name)
    if found is None:
        raise Unsupported(name, f"torch {torch.__version__} lacks this private name", Code.TORCH)
    return found


def lacking() -> list[str]:
    """The names that were not found so far, and what happens without them."""
    return [_lacking(name) for name in _looked_for]


def _lacking(name: str) -> str:
    return f"torch {torch.__version__} lacks {name}: {WITHOUT[name]}"


def storage_key(storage: torch.UntypedStorage) -> int:
    """A key that tensors with shared memory have in common, as long as one of them lives."""
    return int(getattr(storage, "_cdata", id(storage)))  # torch keeps one Python object for each


class _NoMode:
    """A stand-in for a class that torch lacks: entering it raises Unsupported."""

    def __enter__(self) -> None:
        need(_MODE)

    def __exit__(self, *_: object) -> None: ...


_MODE = "torch.utils._python_dispatch.TorchDispatchMode"
if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    TorchDispatchMode = find(_MODE) or _NoMode


class DispatchMode(TorchDispatchMode):
    """A mode under which this package traces. To Dynamo it is none: it would skip what any thread calls meanwhile."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True
