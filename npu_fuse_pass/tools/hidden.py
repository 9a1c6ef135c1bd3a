"""Which of torch's optimizers Dynamo never hands to a backend, why, and what to do instead."""

from __future__ import annotations

import torch

_RULE = "write it with npu_fuse_pass.rule, or run it eagerly"
_HIDDEN: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: f"Dynamo does not look into LBFGS.step, which decides by the loss's value: {_RULE}",
    torch.optim.SparseAdam: "Dynamo does not look into SparseAdam.step: use dense gradients (sparse=False in "
    "torch.nn.Embedding) with torch.optim.Adam, or run it eagerly",
    torch.optim.Adafactor: "Adafactor reads its step counter with item() before it writes anything, and Dynamo breaks "
    f"every graph there: {_RULE}",
}
_FUSED = (
    "fused=True: torch's own fused kernels are hidden from Dynamo. Construct the optimizer without it, or use "
    "npu_fuse_pass.compile_step, which switches it off"
)


def hidden(opt: torch.optim.Optimizer) -> str | None:
    """Why torch never shows this optimizer's step to a backend, with the remedy; None if it does."""
    if uses_fused(opt):
        return _FUSED
    return next((reason for cls, reason in _HIDDEN.items() if isinstance(opt, cls)), None)


def uses_fused(opt: torch.optim.Optimizer) -> bool:
    """Whether torch's own fused kernels run its step."""
    return any(group.get("fused") for group in opt.param_groups)
