"""Optimizers written as update rules: drop-in classes with the signatures of torch_npu.optim.

Each file is one optimizer: the equation and its source, a pure function, and a class around it. They need
torch alone; `torch.compile(opt.step, backend="npu_fused")` makes a step one kernel per group of parameters.
`lion` shows how small an optimizer without a class is; `optimizers.paddle` has Paddle's RMSProp.
"""

from __future__ import annotations

from .adam import NpuFusedAdam
from .adamw import NpuFusedAdamW
from .lamb import NpuFusedLamb
from .lion import lion
from .rmsprop_tf import NpuFusedRMSpropTF
from .sgd import NpuFusedSGD

__all__ = ["NpuFusedAdam", "NpuFusedAdamW", "NpuFusedLamb", "NpuFusedRMSpropTF", "NpuFusedSGD", "lion"]
