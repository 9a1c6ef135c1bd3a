"""Why is my optimizer not fused? Its step looks at the value of a tensor in Python, for every parameter."""

import torch


class Cautious(torch.optim.Optimizer):
    """Skips parameters whose gradient is large."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad.norm().item() < 1.0:
                    p.sub_(group["lr"] * p.grad)


model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
opt = Cautious(model.parameters(), lr=1e-3)
step = torch.compile(opt.step, backend="npu_fused")
for _ in range(3):
    model(torch.randn(16, 4)).square().mean().backward()
    step()
    opt.zero_grad()
