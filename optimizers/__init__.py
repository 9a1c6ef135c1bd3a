"""Optimizers written as update rules: drop-in classes with the signatures of torch_npu.optim.

Each file is one optimizer: the equation and its source, a pure function, and a class around it. They need
torch alone; `torch.compile(opt.step, backend="npu_fused")` makes a step one kernel per group of parameters.
`lion` shows how small an optimizer without a class is; `optimizers.paddle` has Paddle's RMSProp.

A new optimizer is one file, and here its import and its rows. Tests, the NPU lanes, the self-test and the tables of
docs run over `ROWS`; the first row of an optimizer stands for it where its options do not matter.
"""

from __future__ import annotations

import torch

from ._row import Row as Row
from ._row import one_each as one_each
from .adam import NpuFusedAdam as NpuFusedAdam
from .adamw import NpuFusedAdamW as NpuFusedAdamW
from .lamb import NpuFusedLamb as NpuFusedLamb
from .lion import lion as lion
from .paddle import RMSProp as _PaddleRMSProp
from .rmsprop_tf import NpuFusedRMSpropTF as NpuFusedRMSpropTF
from .sgd import NpuFusedSGD as NpuFusedSGD

_MOMENTUM = dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)
_CENTERED = dict(momentum=0.9, centered=True)

ROWS: tuple[Row, ...] = (
    Row("sgd_momentum", NpuFusedSGD, _MOMENTUM, torch.optim.SGD),
    Row("sgd", NpuFusedSGD, dict(lr=0.05), torch.optim.SGD),
    Row("sgd_nesterov", NpuFusedSGD, dict(lr=0.05, momentum=0.9, nesterov=True), torch.optim.SGD),
    Row("adam", NpuFusedAdam, dict(lr=0.02, weight_decay=0.05), torch.optim.Adam),
    Row("adam_amsgrad", NpuFusedAdam, dict(lr=0.02, betas=(0.8, 0.9), amsgrad=True), torch.optim.Adam),
    Row("adamw", NpuFusedAdamW, dict(lr=0.02, weight_decay=0.1), torch.optim.AdamW),
    Row("lamb", NpuFusedLamb, dict(lr=0.02, weight_decay=0.1)),
    Row("lamb_adam", NpuFusedLamb, dict(lr=0.02, adam=True)),
    Row("lamb_global", NpuFusedLamb, dict(lr=0.02, use_global_grad_norm=True)),
    Row("rmsprop_tf_centered", NpuFusedRMSpropTF, dict(lr=0.02, eps=1e-3, lr_in_momentum=False, **_CENTERED)),
    Row("rmsprop_tf", NpuFusedRMSpropTF, dict(lr=0.02, weight_decay=0.1)),
    Row("rmsprop_tf_momentum", NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, weight_decay=0.01, decoupled_decay=True)),
    Row("lion", lion, dict(lr=0.01, weight_decay=0.1)),
    Row("paddle_rmsprop", _PaddleRMSProp, dict(learning_rate=0.02, epsilon=1e-3, weight_decay=0.1, **_CENTERED)),
)

__all__ = sorted({row.optimizer for row in ROWS if "." not in row.optimizer})
