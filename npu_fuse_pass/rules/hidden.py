"""Optimizers of torch whose step Dynamo never hands to a backend: why, and what to do instead."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

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
_BY_NAME = Code.HIDDEN(
    "Dynamo leaves lists empty that a step gives to _init_group by keyword", remedy="give them by position"
)
_FUSED = Code.FUSED_OPTION("fused=True: torch's own fused kernels are hidden from Dynamo")


def hidden(opt: torch.optim.Optimizer) -> Reason | None:
    """Why torch never shows this optimizer's step to a backend; None if it does."""
    return _FUSED if uses_fused(opt) else hidden_class(opt)


def hidden_class(opt: torch.optim.Optimizer) -> Reason | None:
    """Why torch shows no step of this optimizer's class to a backend, whatever its options; None if it does."""
    if _calls_by_keyword(type(opt).step):
        return _BY_NAME
    return next((reason for cls, reason in _HIDDEN.items() if isinstance(opt, cls)), None)


@functools.cache
def _calls_by_keyword(step: Callable[..., Any]) -> bool:
    """True if it passes lists to `_init_group` by keyword: Dynamo calls that itself, and leaves the lists empty."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(c.func, ast.Attribute) and c.func.attr == "_init_group" and c.keywords for c in calls)


def uses_fused(opt: torch.optim.Optimizer) -> bool:
    """True if torch's own fused kernels run its step."""
    return any(group.get("fused") for group in opt.param_groups)
