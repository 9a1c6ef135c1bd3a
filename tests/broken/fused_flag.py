"""Broken on purpose: fused=True keeps torch's own fused kernels away from every backend.

With --fixed: it is left out.
"""

import sys

import torch

fixed = "--fixed" in sys.argv
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
opt = torch.optim.AdamW(model.parameters(), lr=1e-3, **({} if fixed else {"fused": True}))
step = torch.compile(opt.step, backend="npu_fused")
for _ in range(3):
    model(torch.randn(16, 4)).square().mean().backward()
    step()
    opt.zero_grad()
