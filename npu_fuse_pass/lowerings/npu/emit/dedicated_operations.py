"""GE's optimizer operations: those that may compute a matched group, their chips, and why others may not.

A `Match` says which kernel of `match/known_kernels.py` computes a group, in exact arithmetic. This table says which GE
operation computes that kernel: an operation is used where all of this holds.

- Its document names the chip (Atlas training series, A2, A3), and nothing else that is documented contradicts it.
- Every number of the step is an input: an attribute would cost a new GE graph whenever it changes.
- The tensors that it writes are outputs: torchair maps outputs to the tensors that a step writes, and supports no
  other side effect of an operation.
- It is not deprecated. The "D" forms are.

Precision decides which of them is the default. All of them take their numbers in the dtype of their tensors, so they
are given float32 and half-precision tensors are cast around them: in float16 beta2 = 0.999 is 0.9990, 1 - beta2 is 2%
off and epsilon = 1e-8 is 0; in bfloat16 beta2 is 1 and the second moment stands still. In float32 an operation that
takes beta2 and subtracts it from 1 by itself has 1 - float32(0.999) = 0.00099998713, which is 1.3e-5 off, and so is the
second moment, for good; no choice of its inputs avoids that, short of another pass over the gradient. One that takes
beta2 and 1 - beta2 as two numbers is as exact as eager. So:

- kernels="auto", the default, keeps this project's promise, 1e-6 relative in parameters and states: only rows that have
  no `deviation`. That is AdamApplyOneAssign for Adam (one operation, 28 bytes per element) and, behind one
  multiplication of the parameter, for AdamW (36), FusedMulApplyMomentum for momentum (20); AMSGrad stays elementwise.
- kernels="dedicated" takes the fewest operations: ApplyAdamW for AdamW (28) and ApplyAdamWithAmsgradV2 (36). What is
  further off stands in `deviation` and in the report. torch_npu's fused AdamW (aclnnApplyAdamWV2) rounds like that too.
- kernels="elementwise" uses none.

Documents are those of the GE operations in https://gitcode.com/cann/ops-nn (optim/<operation>/README.md and its
prototype op_graph/<operation>_proto.h), and the signatures in torchair's auto_generated_ge_raw_ops.py. Headers of CANN
before 9 marked AdamApplyOneAssign and FusedMulApplyMomentum "experimental"; today's documents do not. Nothing here has
run on an NPU: where GE refuses, the elementwise form runs (`retry`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

TRAINING, A2, A3 = "Atlas training series", "Atlas A2", "Atlas A3"
_SERIES = {  # torch_npu's names of chips; a bare 910B is of the first generation
    re.compile(r"Ascend910(A|B|ProA|ProB|PremiumA)"): TRAINING,
    re.compile(r"Ascend910B\d([-_]\d)?"): A2,
    re.compile(r"Ascend910_93\d+"): A3,
}

Terms = Mapping[str, Any]


def series(name: str | None) -> str | None:
    """The series of a chip by torch_npu's name; None if no document used here has it."""
    return next((found for pattern, found in _SERIES.items() if name and pattern.fullmatch(name)), None)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One GE operation.

    Attributes:
        name: GE's type.
        inputs: in order, the optional ones left out.
        outputs: tensors of the kernel (var, m, ...) in the order of the operation's outputs.
        arguments: per kernel that it computes: the operation's inputs from the kernel's inputs and numbers, as
            expressions or tensors.
        scales: has a factor for the gradient, "grad_scale" in `arguments`.
        function: its mathematics, on tensors in the order of `inputs`; attributes by keyword.
        document: of these semantics; it names all of the chips above.
        attributes: per kernel those that are set to true.
        absent: optional inputs that are left out.
        deviation: by how much it is further from the formula than eager; "": it is as close.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: Mapping[str, Callable[[Terms, Any], dict[str, Any]]]
    function: Callable[..., tuple[torch.Tensor, ...]]
    document: str
    attributes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    scales: bool = False
    deviation: str = ""


# How kernels become operations ----------------------------------------------------------------------------------------
#
# `k` has the kernel's inputs and numbers, `one` is 1; both may be expressions or tensors with arithmetic operators.


def _one_of_adamw(k: Terms, one: Any) -> dict[str, Any]:
    """Put bias correction, which the operation lacks, into step size and epsilon; decay goes ahead of it."""
    correction = (one - k["beta2_power"] * k["beta2"]).sqrt()
    step_size = k["lr"] * correction / (one - k["beta1_power"] * k["beta1"])
    decay = k.get("weight_decay")
    var = k["var"] if decay is None else k["var"] * (one - k["lr"] * decay)
    return _one(k, one, var, step_size, k["epsilon"] * correction)


def _one_of_adam(k: Terms, one: Any) -> dict[str, Any]:
    step_size = k["lr"] * (one - k["beta2_power"]).sqrt() / (one - k["beta1_power"])
    return _one(k, one, k["var"], step_size, k["epsilon"])


def _one(k: Terms, one: Any, var: Any, step_size: Any, epsilon: Any) -> dict[str, Any]:
    tensors = {"input0": k["grad"], "input1": k["v"], "input2": k["m"], "input3": var, "input4": step_size}
    betas = {"mul0_x": k["beta1"], "mul1_x": one - k["beta1"], "mul2_x": k["beta2"], "mul3_x": one - k["beta2"]}
    return {**tensors, **betas, "add2_y": epsilon}


def _same(k: Terms, one: Any) -> dict[str, Any]:
    return {"weight_decay": one - one, **k}


def _momentum(k: Terms, one: Any) -> dict[str, Any]:
    """Pass a number that scales the gradient (1 - dampening) as the operation's own factor."""
    grad, scale = k["grad"], k.get("grad_scale", one)
    return {"var": k["var"], "accum": k["accum"], "lr": k["lr"], "x1": grad, "momentum": k["momentum"], "x2": scale}


# What operations compute, in the order of the documents ---------------------------------------------------------------


def _adam_apply_one(
    input0: Any,
    input1: Any,
    input2: Any,
    input3: Any,
    input4: Any,
    mul0: Any,
    mul1: Any,
    mul2: Any,
    mul3: Any,
    add2: Any,
) -> tuple[Any, ...]:
    v = input1 * mul2 + input0 * input0 * mul3
    m = mul0 * input2 + mul1 * input0
    return v, m, input3 - m / (v.sqrt() + add2) * input4


def _adam_w(
    var: Any, m: Any, v: Any, power1: Any, power2: Any, lr: Any, decay: Any, beta1: Any, beta2: Any, eps: Any, grad: Any
) -> tuple[Any, ...]:
    m = m * beta1 - (beta1 - 1) * grad
    v = v * beta2 - (beta2 - 1) * grad * grad
    update = m / ((-v / (power2 * beta2 - 1)).sqrt() + eps)
    return var * (1 - lr * decay) + lr / (power1 * beta1 - 1) * update, m, v


def _adam_amsgrad(
    var: Any, m: Any, v: Any, vhat: Any, power1: Any, power2: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, grad: Any
) -> tuple[Any, ...]:
    step_size = lr * (1 - power2).sqrt() / (1 - power1)
    m = m + (1 - beta1) * (grad - m)
    v = v + (1 - beta2) * (grad * grad - v)
    vhat = vhat.maximum(v)
    return var - step_size * m / (vhat.sqrt() + eps), m, v, vhat


def _fused_momentum(
    var: Any, accum: Any, lr: Any, x1: Any, momentum: Any, x2: Any, use_nesterov: bool = False
) -> tuple[Any, ...]:
    grad = x1 * x2
    accum = accum * momentum + grad
    return var - (grad * lr + accum * momentum * lr if use_nesterov else accum * lr), accum


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The table ------------------------------------------------------------------------------------------------------------

_OPS_NN = "https://gitcode.com/cann/ops-nn, optim"
_ROUNDED = "1 - beta2 is rounded in float32: the second moment is up to 3e-8/(1 - beta2) off, 1.3e-5 for 0.999"

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "AdamApplyOneAssign",
        _names("input0 input1 input2 input3 input4 mul0_x mul1_x mul2_x mul3_x add2_y"),
        ("v", "m", "var"),
        {"adamw": _one_of_adamw, "adam": _one_of_adam},
        _adam_apply_one,
        f"{_OPS_NN}/adam_apply_one_assign/README.md and adam_apply_one_assign_proto.h",
    ),
    Operation(
        "ApplyAdamW",
        _names("var m v beta1_power beta2_power lr weight_decay beta1 beta2 epsilon grad"),
        ("var", "m", "v"),
        {"adamw": _same},
        _adam_w,
        f"{_OPS_NN}/apply_adam_w/README.md and apply_adam_w_proto.h: the powers are beta**(t-1). "
        "(aclnnApplyAdamW.md leaves out A2 and A3 since 2026; GE does not call aclnn)",
        absent=("max_grad_norm",),
        deviation=_ROUNDED,
    ),
    Operation(
        "ApplyAdamWithAmsgradV2",
        _names("var m v vhat beta1_power beta2_power lr beta1 beta2 epsilon grad"),
        ("var", "m", "v", "vhat"),
        {"adam_amsgrad": lambda k, one: dict(k)},
        _adam_amsgrad,
        f"{_OPS_NN}/apply_adam_with_amsgrad_v2/README.md: the powers are beta**t; float32 only, numbers of shape (1,)",
        deviation=f"{_ROUNDED}, and its largest value with it",
    ),
    Operation(
        "FusedMulApplyMomentum",
        _names("var accum lr x1 momentum x2"),
        ("var", "accum"),
        {"momentum": _momentum, "nesterov": _momentum},
        _fused_momentum,
        f"{_OPS_NN}/fused_mul_apply_momentum/README.md and fused_mul_apply_momentum_proto.h: grad = x1·x2",
        attributes={"nesterov": ("use_nesterov",)},
        scales=True,
    ),
)
"""The operations that may be used, best documented precision first."""

_DEPRECATED = "deprecated (its prototype says so)"
_NO_SLOTS = "its only output is var: torchair cannot know that it writes the states, too"
UNUSED: dict[str, str] = {
    "ApplyAdam": _NO_SLOTS,
    "ApplyAdamD": _DEPRECATED,
    "ApplyAdamV2": "no bias correction, and it needs the global norm",
    "ApplyAdamWV2": "all numbers but the step are attributes; with amsgrad the maximum is of the corrected v",
    "ApplyAdamWithAmsgrad": _NO_SLOTS,
    "ApplyAdamWithAmsgradD": f"{_DEPRECATED}; beta1, beta2 and epsilon are attributes",
    "AdamApplyOne": "its prototype says: experimental, please do not use",
    "AdamApplyOneWithDecay": "its prototype says: experimental, please do not use",
    "AdamApplyOneWithDecayAssign": "its document leaves out the decay; its prototype says: experimental",
    "ApplyMomentum": _NO_SLOTS,
    "ApplyMomentumD": _DEPRECATED,
    "ApplyKerasMomentum": "the learning rate is inside the momentum",
    "InplaceApplyMomentum": "documented for Ascend 950 only",
    "SGD": "dampening and weight decay are attributes; it writes accum and stat, which are no outputs",
    "ApplyRMSProp": _NO_SLOTS,
    "ApplyRMSPropD": f"{_DEPRECATED}; rho, momentum and epsilon are attributes",
    "ApplyCenteredRMSProp": f"{_NO_SLOTS}; two documents disagree on A2 and A3",
    "ApplyCenteredRMSPropD": _DEPRECATED,
    "LambApplyOptimizerAssign": "its prototype says: experimental; documents disagree on A2 and A3",
    "LambApplyWeightAssign": "not documented for A2 and A3",
}
"""Why other operations for optimizers are not used."""


def candidates(kernel: str, kernels: str) -> list[Operation] | str:
    """The operations that may compute a kernel, or why none may.

    Args:
        kernel: its name in `match/known_kernels.py`.
        kernels: the option, "auto" or "dedicated".
    """
    known = [o for o in OPERATIONS if kernel in o.arguments]
    if not known:
        return "no operation in the table computes it: see UNUSED in lowerings/npu/emit/dedicated_operations.py"
    found = [o for o in known if not o.deviation or kernels == "dedicated"]
    return found or f'{known[0].name} needs options={{"kernels": "dedicated"}}, as {known[0].deviation}'
