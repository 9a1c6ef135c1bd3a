"""Broken on purpose: one operation of this optimizer's step, a sort, has no place in a kernel of updates.

With --fixed: the middle of the gradients is their mean.
"""

import sys

import torch

fixed = "--fixed" in sys.argv


class Centred(torch.optim.Optimizer):
    """Centres every gradient at its median."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad - middle(p.grad)))


def middle(grad):
    return grad.mean() if fixed else grad.flatten().sort().values[grad.numel() // 2]


model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
opt = Centred(model.parameters(), lr=1e-3)
step = torch.compile(opt.step, backend="npu_fused")
for _ in range(3):
    model(torch.randn(16, 4)).square().mean().backward()
    step()
    opt.zero_grad()
