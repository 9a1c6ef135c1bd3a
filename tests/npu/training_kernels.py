"""GE's optimizer operations (nn_training_ops.h, experiment_ops.h) for `kernels`. Outputs are the new var and slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from interpreter import Node


def one_dtype(tensors: Sequence[Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"operands have different dtypes: {sorted(map(str, dtypes))}")


def apply_adam_w(node: Node) -> list[Tensor]:
    """The formula in apply_adam_w_proto.h (hicann/ops-nn): beta*_power are beta**(step-1)."""
    var, m, v, power1, power2, lr, decay, beta1, beta2, eps, grad = node.inputs[:11]
    assert all(tensor is not None for tensor in node.inputs[:11])
    if node.flag("amsgrad", False):
        raise ValueError('amsgrad: "only support False"')
    one_dtype([tensor for tensor in node.inputs if tensor is not None])
    gradient: Any = -grad if node.flag("maximize", False) else grad
    m_out: Any = m * beta1 - (beta1 - 1) * gradient
    v_out: Any = v * beta2 - (beta2 - 1) * gradient * gradient
    denominator = torch.sqrt(-v_out / (power2 * beta2 - 1)) + eps
    return [var * (1 + (-lr * decay)) + (lr / (power1 * beta1 - 1)) * (m_out / denominator), m_out, v_out]


def apply_momentum_d(node: Node) -> list[Tensor]:
    """nn_training_ops.h, TensorFlow's ApplyMomentum: accum = accum*momentum + grad; var -= lr*accum.

    use_nesterov: var -= grad*lr + accum*momentum*lr.
    """
    var, accum, lr, grad, momentum = node.tensors()
    one_dtype(node.tensors())
    accum = accum * momentum + grad
    step = grad * lr + accum * momentum * lr if node.flag("use_nesterov", False) else accum * lr
    return [var - step, accum]


def apply_adam_amsgrad_v2(node: Node) -> list[Tensor]:
    """nn_training_ops.h, TensorFlow's ApplyAdamWithAmsgrad: vhat = max(vhat, v); beta*_power are beta**step.

    Numbers have the shape (1,) (ops-nn, optim/apply_adam_with_amsgrad_v2/README.md).
    """
    var, m, v, vhat, power1, power2, lr, beta1, beta2, eps, grad = node.tensors()
    one_dtype(node.tensors())
    if any(number.shape != (1,) for number in (power1, power2, lr, beta1, beta2, eps)):
        raise ValueError("numbers must have the shape (1,)")
    step_size = lr * torch.sqrt(1 - power2) / (1 - power1)
    m = m + (grad - m) * (1 - beta1)
    v = v + (grad * grad - v) * (1 - beta2)
    vhat = torch.maximum(vhat, v)
    return [var - step_size * m / (torch.sqrt(vhat) + eps), m, v, vhat]


def fused_mul_apply_momentum(node: Node) -> list[Tensor]:
    """ops-nn, optim/fused_mul_apply_momentum/README.md: accum = accum*m + x1*x2; var -= accum*lr.

    use_nesterov: var = var - x1*x2*lr - accum*m*lr.
    """
    var, accum, lr, x1, momentum, x2 = node.tensors()
    one_dtype(node.tensors())
    if var.shape != accum.shape or var.shape != x1.shape or any(t.numel() != 1 for t in (lr, momentum, x2)):
        raise ValueError("var, accum and x1 must have one shape, the others one element")
    new = accum * momentum + x1 * x2
    if node.flag("use_nesterov", False):
        return [var - x1 * x2 * lr - new * momentum * lr, new]
    return [var - new * lr, new]


def adam_apply_one_assign(node: Node) -> list[Tensor]:
    """ops-nn, optim/adam_apply_one_assign/README.md; input0 is the gradient, input1 v, input2 m, input3 var."""
    input0, input1, input2, input3, input4, mul0_x, mul1_x, mul2_x, mul3_x, add2_y = node.tensors()
    one_dtype(node.tensors())
    out_input1 = input1 * mul2_x + torch.square(input0) * mul3_x
    out_input2 = mul0_x * input2 + mul1_x * input0
    return [out_input1, out_input2, input3 - out_input2 / (torch.sqrt(out_input1) + add2_y) * input4]


KERNELS: dict[str, Callable[[Node], Sequence[Tensor]]] = {
    "AdamApplyOneAssign": adam_apply_one_assign,
    "ApplyAdamW": apply_adam_w,
    "FusedMulApplyMomentum": fused_mul_apply_momentum,
    "ApplyMomentumD": apply_momentum_d,
    "ApplyAdamWithAmsgradV2": apply_adam_amsgrad_v2,
}
