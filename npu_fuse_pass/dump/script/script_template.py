"""The fused graph of one compile, written down by npu_fuse_pass.

`python 03_fused_graph.py` runs it and the captured graph on the same random inputs, on the CPU, and exits with 1 if a
result differs. It needs torch and npu_fuse_pass.
"""

import math  # noqa: F401
import operator  # noqa: F401
import sys
from collections.abc import Iterator
from math import inf, nan  # noqa: F401
from typing import Any

import torch
from torch import device  # noqa: F401

import npu_fuse_pass.ir.fused_op  # noqa: F401  (what a fused node computes)
from npu_fuse_pass.tolerances import TRAJECTORY

# what follows differs from step to step
INPUTS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
SWITCHES: list[str] = []
ZEROS: list[str] = []
RETURNED: list[int] = []


class Captured:
    """The captured graph."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What it returns, in order; RETURNED are new tensors."""


class Fused:
    """The fused graph."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The new tensors that the captured one returns."""


# what follows is the same for every step
def value(dtype: torch.dtype, shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    """A random tensor; `signed`: also with negative elements."""
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 9, shape).to(dtype)
    made = torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1
    signs = torch.randint(0, 2, shape) * 2 - 1 if signed and shape else 1
    return torch.mul(made, signs).to(dtype)


def inputs(signed: bool, on: bool) -> dict[str, torch.Tensor]:
    """Arguments for both graphs; `on`: switches are not zero."""
    torch.manual_seed(0)
    made = {name: value(*kind, signed) for name, kind in INPUTS.items()}
    for name in [*ZEROS, *([] if on else SWITCHES)]:
        made[name].zero_()
    return made


def differences(signed: bool, on: bool) -> Iterator[str]:
    """What differs between the two graphs, in words."""
    theirs, ours = captured(inputs(signed, on)), inputs(signed, on)
    ours |= zip((f"returned[{i}]" for i in RETURNED), Fused().forward(*ours.values()), strict=True)
    exact: dict[str, torch.Tensor] = {}
    for name, a in theirs.items():
        b, place = ours[name], f"{name}, {a.dtype} {tuple(a.shape)}"
        worst, allowed = error(b, a), TRAJECTORY.get(a.dtype, 0.0)
        if worst > allowed and a.is_floating_point():
            # counters of steps are float32, in which 1 - beta**step loses digits; the fused graph computes in float64
            exact = exact or captured({n: x if x.shape else x.double() for n, x in inputs(signed, on).items()})
            worst = min(worst, error(b, exact[name]))
        if a.dtype != b.dtype:
            yield f"{place}: the fused graph gives {b.dtype}"
        elif not (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())):
            yield f"{place}: NaN or infinite elements, captured {counts(a)}, fused {counts(b)}"
        elif worst > allowed:
            yield f"{place}: relative difference up to {worst:.3g}"


def captured(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments after the captured graph has run on them, and what it returns."""
    returned = Captured().forward(*given.values())
    return given | {f"returned[{i}]": returned[i] for i in RETURNED}


def error(b: torch.Tensor, a: torch.Tensor) -> float:
    """The largest of |b - a| / (1e-3 + |a|)."""
    found = ((b.double() - a.double()).abs() / (1e-3 + a.double().abs())).nan_to_num(0.0, 0.0)
    return float(found.max()) if found.numel() else 0.0


def counts(x: torch.Tensor) -> str:
    """How many elements are no finite numbers."""
    return f"{int(x.isnan().sum())} NaN and {int(x.isinf().sum())} inf of {x.numel()}"


def main() -> int:
    """The exit status."""
    with torch.no_grad():
        found = [text for signed in (False, True) for on in (True, False) for text in differences(signed, on)]
    print(*(dict.fromkeys(found) or ["the fused graph computes what the captured one does"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
