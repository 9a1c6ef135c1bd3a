"""Broken on purpose: a scheduler changes an lr that is a Python number, and a gradient is None at every other step.

With --fixed: the lr is a tensor, and gradients stay.
"""

import sys

import torch

fixed = "--fixed" in sys.argv
torch.manual_seed(0)
model = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
lr = torch.tensor(0.01) if fixed else 0.01
opt = torch.optim.Adam(model.parameters(), lr=lr)
scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
step = torch.compile(opt.step, backend="npu_fused")
for i in range(3):
    x = model[0](torch.randn(4, 8))
    loss = model[1](x) if fixed or i % 2 == 0 else x  # the second layer is left out at odd steps
    loss.square().mean().backward()
    step()
    scheduler.step()
    opt.zero_grad(set_to_none=not fixed)
