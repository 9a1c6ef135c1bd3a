"""torch's own fused kernels (fused=True), which no backend sees: switched off, and on again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules.hidden import uses_fused
from npu_fuse_pass.user_warnings import warn


class FusedOption:
    """The option of an optimizer whose step is compiled.

    Args:
        opt: the optimizer.
        by: the public function that compiles it, for the warning.
    """

    def __init__(self, opt: torch.optim.Optimizer, by: str) -> None:
        self._opt, self._by = opt, by
        self._were_on: list[dict[str, Any]] = []

    def switch_off(self) -> None:
        """Switch fused=True off with a warning, also when a checkpoint brings it back."""
        opt = self._opt
        if not uses_fused(opt):
            return
        warn(
            f"npu_fused: {type(opt).__name__} was constructed with fused=True, which torch hides from every backend; "
            f"{self._by} has switched it off. Construct the optimizer without it to avoid this warning"
        )
        for settings in (opt.defaults, *opt.param_groups):
            if settings.get("fused"):
                settings["fused"] = False
                self._were_on.append(settings)
        opt._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # GradScaler then unscales before the step
        for _, entry in _counted(opt):
            entry["step"] = entry["step"].cpu()  # fused kernels keep counters on the device

    def restore(self) -> None:
        """Switch fused=True on again where it was."""
        if not self._were_on:
            return
        for settings in self._were_on:
            settings["fused"] = True
        self._were_on.clear()
        self._opt._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        for p, entry in _counted(self._opt):
            entry["step"] = entry["step"].to(p.device)


def _counted(opt: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Parameters whose entry has a tensor that counts their steps, with it; other keys are the user's."""
    entries = [(p, entry) for p, entry in opt.state.items() if isinstance(p, Tensor)]
    return [(p, entry) for p, entry in entries if isinstance(entry.get("step"), Tensor)]
