"""What scripts/conversion_table.py and tests/npu convert: stock optimizers, ours with their options, users' rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import optimizers
from npu_fuse_pass.rules import rule, zeros

Make = Callable[[Any], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer with options.

    Args:
        name: of the row.
        make: parameters -> optimizer.
        stock: whether it is torch.optim's, which torchair can be given without this package.
    """

    name: str
    make: Make
    stock: bool = True


def _stock(name: str, **options: Any) -> Make:
    return lambda params: getattr(torch.optim, name)(params, **options)


_STOCK: list[tuple[str, str, dict[str, Any]]] = [
    ("SGD", "SGD", dict(lr=0.02)),
    ("SGD momentum", "SGD", dict(lr=0.02, momentum=0.9)),
    ("SGD nesterov, decay", "SGD", dict(lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("Adam", "Adam", dict(lr=0.02)),
    ("Adam amsgrad, decay", "Adam", dict(lr=0.02, amsgrad=True, weight_decay=0.1)),
    ("AdamW", "AdamW", dict(lr=0.02)),
    ("RMSprop", "RMSprop", dict(lr=0.02)),
    ("RMSprop centered, momentum", "RMSprop", dict(lr=0.02, centered=True, momentum=0.9)),
    ("Adagrad", "Adagrad", dict(lr=0.02)),
    ("Adadelta", "Adadelta", dict(lr=0.5)),
    ("Adamax", "Adamax", dict(lr=0.02)),
    ("NAdam", "NAdam", dict(lr=0.02)),
    ("RAdam", "RAdam", dict(lr=0.02)),
    ("Rprop", "Rprop", dict(lr=0.02)),
    ("ASGD", "ASGD", dict(lr=0.02)),
]


@rule(states={"exp_avg": zeros}, defaults=dict(lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.01))
def my_lion(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: Tensor, beta1: Tensor, beta2: Tensor, weight_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Lion with lerp and in-place arithmetic, as it is often written (arXiv 2302.06675)."""
    update = exp_avg.lerp(grad, 1 - beta1).sign_()
    return param.mul(1 - lr * weight_decay).sub_(lr * update), exp_avg.lerp(grad, 1 - beta2)


@rule(
    states=dict(exp_avg=zeros, exp_avg_diff=zeros, exp_avg_sq=zeros, previous_grad=zeros),
    defaults=dict(lr=1e-3, beta1=0.98, beta2=0.92, beta3=0.99, eps=1e-8, weight_decay=0.02),
)
def adan(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    previous_grad: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    beta3: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adan (arXiv 2208.06677): four states, one of them the gradient before; three bias corrections."""
    difference = torch.where(step == 1, torch.zeros_like(grad), grad - previous_grad)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_diff = beta2 * exp_avg_diff + (1 - beta2) * difference
    look_ahead = grad + beta2 * difference
    exp_avg_sq = beta3 * exp_avg_sq + (1 - beta3) * look_ahead * look_ahead
    root = (exp_avg_sq / (1 - beta3**step)).sqrt() + eps
    update = (exp_avg / (1 - beta1**step) + beta2 * exp_avg_diff / (1 - beta2**step)) / root
    return (param - lr * update) / (1 + lr * weight_decay), exp_avg, exp_avg_diff, exp_avg_sq, grad


@rule(states={"momentum_buffer": zeros}, defaults=dict(lr=1e-2, momentum=0.9, limit=0.5))
def clamped_sign_momentum(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, lr: Tensor, momentum: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Momentum on clamped gradients; the sign of the buffer, softened where the buffer is small."""
    momentum_buffer = momentum * momentum_buffer + torch.minimum(torch.maximum(grad, -limit), limit)
    return param - lr * momentum_buffer.sign() * (4 * momentum_buffer.abs()).clamp(max=1.0), momentum_buffer


@rule(states={"momentum_buffer": zeros}, defaults=dict(lr=1e-1, momentum=0.9, trust=0.01, weight_decay=1e-4, eps=1e-8))
def lars(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: Tensor,
    momentum: Tensor,
    trust: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor]:
    """LARS (arXiv 1708.03888): a rate for each tensor from the norms of the tensor and its gradient."""
    weight, gradient = param.norm(), grad.norm()
    ratio = torch.where(weight * gradient > 0, trust * weight / (gradient + weight_decay * weight + eps), 1.0)
    momentum_buffer = momentum * momentum_buffer + lr * ratio * (grad + weight_decay * param)
    return param - momentum_buffer, momentum_buffer


RULES: dict[str, Make] = {
    "my_lion": lambda p: my_lion(p, lr=0.02),
    "adan": lambda p: adan(p, lr=0.02),
    "clamped_sign_momentum": lambda p: clamped_sign_momentum(p, lr=0.02),
    "lars": lambda p: lars(p, lr=0.1),
}
OURS: dict[str, Make] = {row.optimizer: row.build for row in optimizers.one_each(optimizers.ROWS)}
MUON = Row("Muon", _stock("Muon", lr=0.02))
ADAFACTOR = Row("Adafactor", _stock("Adafactor", lr=0.02))
STOCK = [
    Row(f"{name}, {form}", _stock(kind, **options, foreach=form == "foreach"))
    for name, kind, options in _STOCK
    for form in ("for-loop", "foreach")
]
ROWS = [
    *STOCK,
    MUON,
    ADAFACTOR,
    *(Row(name, make, stock=False) for name, make in OURS.items()),
    *(Row(f"rule {name}", make, stock=False) for name, make in RULES.items()),
]
