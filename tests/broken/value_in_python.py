"""Broken on purpose: the step of this optimizer reads the value of a tensor in Python, for every parameter.

With --fixed: it decides with torch.where.
"""

import sys

import torch

fixed = "--fixed" in sys.argv


class Cautious(torch.optim.Optimizer):
    """Skips parameters whose gradient is large."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                size = p.grad.square().sum()
                if fixed:
                    p.sub_(group["lr"] * torch.where(size < 1, p.grad, torch.zeros_like(p.grad)))
                elif size.item() < 1:
                    p.sub_(group["lr"] * p.grad)


model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
opt = Cautious(model.parameters(), lr=1e-3)
step = torch.compile(opt.step, backend="npu_fused")
for _ in range(3):
    model(torch.randn(16, 4)).square().mean().backward()
    step()
    opt.zero_grad()
