"""Broken on purpose: the kernels that are generated in this process divide where the formula multiplies by a number.

With --fixed: they do not.
"""

import dataclasses
import re
import sys

import torch

import npu_fuse_pass
from npu_fuse_pass.lowerings.cpu import kernel as cpu_kernel


@npu_fuse_pass.rule(states={"average": npu_fuse_pass.zeros}, defaults=dict(lr=0.1, beta=0.9))
def slow_descent(param, grad, average, *, lr, beta):
    average = beta * average + (1 - beta) * grad
    return param - lr * average / (average.abs() + 1e-3), average


def wrong(*given, **named):
    """A generated kernel with one operation exchanged for another."""
    source = generate(*given, **named)
    return dataclasses.replace(source, text=re.sub(r"(const float v\d+ = v\d+) / v", r"\1 * v", source.text))


generate = cpu_kernel.generate
if "--fixed" not in sys.argv:
    cpu_kernel.generate = wrong
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
opt = slow_descent(model.named_parameters())
step = torch.compile(opt.step, backend="npu_fused")
for _ in range(3):
    model(torch.randn(4, 8)).square().mean().backward()
    step()
    opt.zero_grad()
