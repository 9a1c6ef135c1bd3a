"""Pairs that are not drawn, with the reason: what differs today, and what cannot be asked of an optimizer."""

from __future__ import annotations

from .optimizers import Drawn

_BRANCHES = (
    "a comparison of a tensor, or in code that Dynamo traces of a NumPy number, is one; a step that keeps it as a "
    "truth and branches on it is captured by nobody afterwards, which is an error of compile_step"
)

# row -> optimizers (all: "*", "ours", "stock", or a name), reason
LEFT_OUT: dict[str, tuple[tuple[str, ...], str]] = {
    "twice": (
        ("NpuFusedSGD", "Adam foreach", "SGD foreach"),
        "at the first step torch.optim.SGD takes the gradient as its buffer at every listing, ours at the first one; "
        "a captured foreach step of torch's is another one than its eager one",
    ),
    "grad is the parameter": (
        ("NpuFusedAdamW", "NpuFusedAdamW state_dtype"),
        "a rule reads everything before it writes; torch.optim's class writes the parameter, then reads the gradient",
    ),
    **dict.fromkeys(("lr NumPy's", "lr tensor", "in: lr tensor"), (("Keeping",), _BRANCHES)),
}

# optimizers of which no programs are drawn
OPTIMIZERS_LEFT_OUT: dict[str, str] = {}


def is_left_out(row: str, optimizer: Drawn) -> bool:
    """Whether this row is not drawn for the optimizer."""
    names, _ = LEFT_OUT.get(row, ((), ""))
    return bool({"*", "ours" if optimizer.ours else "stock", optimizer.name} & {*names})
