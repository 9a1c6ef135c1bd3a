"""Contents of dumps for tests: what the stages make of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass import pipeline
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.options import Options
from tests.support.graphs import batches_of


def parameters(count: int, shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,))) -> list[torch.nn.Parameter]:
    """Small parameters with gradients, shapes in turn."""
    made = [torch.nn.Parameter(torch.randn(shapes[i % len(shapes)])) for i in range(count)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def contents_of(step: Callable[[], Any], platform: str = "cpu") -> Contents:
    """What there is to show of the last graph that Dynamo captures of a step."""
    found: list[Contents] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        options = Options(platform)
        found.append(pipeline._contents(pipeline.fuse_graph(gm, options), options, gm))
        return gm.forward

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(step, backend=backend)()
    return found[-1]


def contents_of_rule(opt: Any) -> Contents:
    """What there is to show of the step of an optimizer of ours by itself."""
    options = Options("cpu")
    return pipeline._contents(pipeline.fuse_batches(batches_of(opt), options), options)
