"""Why is my optimizer not fused? One operation of its step has no place in a kernel of updates: a sort."""

import torch


class Median(torch.optim.Optimizer):
    """Centres every gradient at its median, which a sort finds."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                ordered = p.grad.flatten().sort().values
                p.sub_(group["lr"] * (p.grad - ordered[len(ordered) // 2]))


model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
opt = Median(model.parameters(), lr=1e-3)
step = torch.compile(opt.step, backend="npu_fused")
for _ in range(3):
    model(torch.randn(16, 4)).square().mean().backward()
    step()
    opt.zero_grad()
