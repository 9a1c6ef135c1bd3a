"""Which of torch's optimizers Dynamo never hands to a backend, why, and what to do instead."""

from __future__ import annotations

import torch

from npu_fuse_pass.reasons import Code, Reason

_RULE = "write it with npu_fuse_pass.rule, or run it eagerly"
_HIDDEN: dict[type[torch.optim.Optimizer], Reason] = {
    torch.optim.LBFGS: Code.HIDDEN(
        "Dynamo does not look into LBFGS.step, which decides by the loss's value", remedy=_RULE
    ),
    torch.optim.SparseAdam: Code.HIDDEN(
        "Dynamo does not look into SparseAdam.step",
        remedy="use dense gradients (sparse=False in torch.nn.Embedding) with torch.optim.Adam, or run it eagerly",
    ),
    torch.optim.Adafactor: Code.HIDDEN(
        "Adafactor reads its step counter with item() before it writes anything, and Dynamo breaks every graph there",
        remedy=_RULE,
    ),
}
_FUSED = Code.FUSED_OPTION("fused=True: torch's own fused kernels are hidden from Dynamo")


def hidden(opt: torch.optim.Optimizer) -> Reason | None:
    """Why torch never shows this optimizer's step to a backend; None if it does."""
    if uses_fused(opt):
        return _FUSED
    return next((reason for cls, reason in _HIDDEN.items() if isinstance(opt, cls)), None)


def uses_fused(opt: torch.optim.Optimizer) -> bool:
    """Whether torch's own fused kernels run its step."""
    return any(group.get("fused") for group in opt.param_groups)
