"""Golden trajectories of the original implementations: the cases, their inputs and their numbers.

`trajectories.npz` was made by running the originals on a CPU; `manifest.json` has every case's keyword
arguments and `inputs.py` the closed formulas of the inputs. Sources: `torch` (torch.optim 2.13), `npu`
(torch_npu.optim's own arithmetic), `paddle` (PaddlePaddle 3.3.1).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import inputs

_HERE = Path(__file__).parent
SHAPES = inputs.SHAPES


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case: how the original was called and what it did."""

    name: str
    source: str
    cls: str
    kwargs: dict[str, Any]
    groups: list[dict[str, Any]] | None
    grad_mask: str
    scale: float
    dtypes: list[str]
    special: str = ""
    repaired: str = ""

    @property
    def steps(self) -> int:
        return 10 if self.special else inputs.STEPS

    def parameters(self, dtype: str) -> list[Tensor]:
        """Fresh parameters; those of the documents' example already have their gradients."""
        if self.special:
            return doc_example_parameters()
        made = [torch.from_numpy(inputs.init_param(i)).to(getattr(torch, dtype)) for i in range(len(SHAPES))]
        return [torch.nn.Parameter(p) for p in made]

    def set_gradients(self, params: list[Tensor], t: int) -> None:
        """Give the parameters their gradients of step `t`, counted from 0."""
        for i, p in enumerate(params if not self.special else []):
            here = inputs.mask(self.grad_mask, i, t)
            p.grad = torch.from_numpy(inputs.grad_at(i, t, self.scale)).to(p.dtype) if here else None

    def updated(self) -> int:
        """How many parameters ever get a gradient."""
        if self.special:
            return 6
        return sum(any(inputs.mask(self.grad_mask, i, t) for t in range(self.steps)) for i in range(len(SHAPES)))

    def parameter_argument(self, params: list[Tensor]) -> list[Any]:
        """What the constructor gets: parameters, or groups with their options."""
        if self.groups is None:
            return params
        options = [{k: v for k, v in g.items() if k != "idx"} for g in self.groups]
        return [{"params": [params[i] for i in g["idx"]], **o} for g, o in zip(self.groups, options, strict=True)]

    def trajectory(self, dtype: str) -> np.ndarray:
        """[steps + 1, elements]: all parameters ravelled, row 0 the initial values."""
        return _arrays()[f"{self.name}|{dtype}|params"]

    def final_states(self, dtype: str) -> dict[str, np.ndarray]:
        """State name -> values of all parameters that have it, ravelled."""
        prefix = f"{self.name}|{dtype}|state:"
        return {k.removeprefix(prefix): v for k, v in _arrays().items() if k.startswith(prefix)}


def doc_example_parameters() -> list[Tensor]:
    """The parameters of the documents' example, made as it makes them; the last one has no gradient."""
    shapes = [(2, 3), (4, 3), (2, 3), (4, 3), (5, 3), (6, 3), (2, 3)]
    params = [torch.arange(float(np.prod(s))).reshape(s) for s in shapes]
    params = [p.half() if i in (2, 3, 5) else p for i, p in enumerate(params)]
    for p in params[:-1]:
        p.requires_grad = True
        p.grad = p.clone().detach() / 100.0
    return params


def flat(tensors: list[Tensor]) -> np.ndarray:
    """All values as one float64 vector."""
    return torch.cat([t.detach().double().ravel() for t in tensors]).numpy()


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The goldens' measure: the largest |a - b| / (1e-3 + |b|)."""
    return float(np.max(np.abs(got - want) / (1e-3 + np.abs(want)), initial=0.0))


def all_goldens() -> list[Golden]:
    """Every case of the manifest."""
    cases = json.loads((_HERE / "manifest.json").read_text())["cases"]
    made = [Golden(name=name, **fields) for name, fields in cases.items()]
    have = {key.rpartition("|")[0] for key in _arrays()}  # one case lacks float64: Paddle has no such kernel
    return [dataclasses.replace(g, dtypes=[d for d in g.dtypes if f"{g.name}|{d}" in have]) for g in made]


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(_HERE / "trajectories.npz") as archive:
        return dict(archive)
