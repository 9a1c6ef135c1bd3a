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
    """nn_training_ops.h, TensorFlow's ApplyAdamWithAmsgrad: vhat = max(vhat, v); beta*_power are beta**step."""
    var, m, v, vhat, power1, power2, lr, beta1, beta2, eps, grad = node.tensors()
    one_dtype(node.tensors())
    step_size = lr * torch.sqrt(1 - power2) / (1 - power1)
    m = m + (grad - m) * (1 - beta1)
    v = v + (grad * grad - v) * (1 - beta2)
    vhat = torch.maximum(vhat, v)
    return [var - step_size * m / (torch.sqrt(vhat) + eps), m, v, vhat]


KERNELS: dict[str, Callable[[Node], Sequence[Tensor]]] = {
    "ApplyAdamW": apply_adam_w,
    "ApplyMomentumD": apply_momentum_d,
    "ApplyAdamWithAmsgradV2": apply_adam_amsgrad_v2,
}
