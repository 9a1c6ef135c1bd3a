"""Optimizers with the interface of paddle.optimizer, for torch's parameters: RMSProp and what it takes."""

from __future__ import annotations

from .clip import (
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    GradientClipBase,
    GradientClipByGlobalNorm,
    GradientClipByNorm,
    GradientClipByValue,
)
from .lr import LRScheduler, PiecewiseDecay, PiecewiseLR
from .regularizer import L1Decay, L2Decay, WeightDecayRegularizer
from .rmsprop import RMSProp

__all__ = [
    "ClipGradByGlobalNorm",
    "ClipGradByNorm",
    "ClipGradByValue",
    "GradientClipBase",
    "GradientClipByGlobalNorm",
    "GradientClipByNorm",
    "GradientClipByValue",
    "L1Decay",
    "L2Decay",
    "LRScheduler",
    "PiecewiseDecay",
    "PiecewiseLR",
    "RMSProp",
    "WeightDecayRegularizer",
]
