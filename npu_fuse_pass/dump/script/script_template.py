"""The fused graph of one compile, written down by npu_fuse_pass.

`python 03_fused_graph.py` runs it and the captured graph on the same random inputs, on the CPU, and exits with 1 if a
result differs. It needs torch and npu_fuse_pass.
"""

import copy
import math  # noqa: F401
import operator  # noqa: F401
import sys
from collections.abc import Iterator
from typing import Any

import torch

import npu_fuse_pass.ir.fused_op  # noqa: F401  (what a fused node computes)
from npu_fuse_pass.tolerances import TRAJECTORY

# what follows differs from step to step
SWITCHES: list[str] = []
ZEROS: list[str] = []
INPUTS: dict[str, Any] = {}


def captured(**given: Any) -> list[Any]:
    """The captured graph; what it returns as new tensors."""
    return []


def fused(**given: Any) -> list[Any]:
    """The fused graph, likewise."""
    return []


# what follows is the same for every step
def value(kind: Any, signed: bool) -> torch.Tensor:
    """A random tensor; `signed`: also with negative elements."""
    dtype, shape = kind
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 9, shape).to(dtype)
    made = torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1
    signs = torch.randint(0, 2, shape) * 2 - 1 if signed and shape else 1
    return torch.mul(made, signs).to(dtype)


def inputs(signed: bool, on: bool) -> dict[str, Any]:
    """Arguments for both graphs; `on`: switches are not zero."""
    torch.manual_seed(0)
    made: dict[str, Any] = {
        name: [value(k, signed) for k in kinds] if isinstance(kinds, list) else value(kinds, signed)
        for name, kinds in INPUTS.items()
    }
    switched = {name: made[name] for name in [*ZEROS, *([] if on else SWITCHES)]}
    for tensors in switched.values():
        for tensor in tensors if isinstance(tensors, list) else [tensors]:
            tensor.zero_()
    return made


def differences(signed: bool, on: bool) -> Iterator[str]:
    """What differs between the two graphs, in words."""
    theirs = inputs(signed, on)
    ours = copy.deepcopy(theirs)
    theirs["returned"] = list(captured(**theirs))
    ours["returned"] = list(fused(**ours))
    for name, want in theirs.items():
        pairs = zip(want, ours[name], strict=True) if isinstance(want, list) else [(want, ours[name])]
        for i, (a, b) in enumerate(pairs):
            error = ((b.double() - a.double()).abs() / (1e-3 + a.double().abs())).nan_to_num(0.0, 0.0)
            worst = float(error.max()) if error.numel() else 0.0
            place = f"{name}[{i}], {a.dtype} {tuple(a.shape)}"
            if a.dtype != b.dtype:
                yield f"{place}: the fused graph gives {b.dtype}"
            elif not (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())):
                yield f"{place}: NaN or infinite elements, captured {counts(a)}, fused {counts(b)}"
            elif worst > TRAJECTORY.get(a.dtype, 0.0):  # of |fused - captured| / (1e-3 + |captured|)
                yield f"{place}: relative difference up to {worst:.3g}"


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
