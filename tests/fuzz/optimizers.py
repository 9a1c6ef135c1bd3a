"""The optimizers of random programs: ours, rules, and torch.optim's in foreach form and as a loop."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How a program makes an optimizer.

    Args:
        text: the expression.
        stock: of torch.optim's class that computes the same.
        states: names of the states that have the parameter's shape.
        numbers: hyperparameters besides lr and weight_decay, with a value that they may get.
    """

    name: str
    text: str
    states: tuple[str, ...]
    stock: str = ""
    numbers: tuple[tuple[str, str], ...] = ()

    @property
    def ours(self) -> bool:
        return self.text.startswith(("optimizers.", "clipped("))


_MOMENTS = ("exp_avg", "exp_avg_sq")
_BETAS = (("betas", "(0.8, 0.95)"), ("eps", "1e-6"))


def _adam(name: str, cls: str, more: str = "", stock_more: str = "") -> Drawn:
    stock = f"torch.optim.{cls}(ps, lr=0.05, weight_decay=0.1, foreach=False{stock_more})"
    return Drawn(name, f"optimizers.NpuFused{cls}(ps, lr=0.05, weight_decay=0.1{more})", _MOMENTS, stock, _BETAS)


def _torch(cls: str, form: str, states: tuple[str, ...], options: str = "", *numbers: tuple[str, str]) -> Drawn:
    text = f"torch.optim.{cls}(ps, lr=0.05, weight_decay=0.1, foreach={form == 'foreach'}{options})"
    return Drawn(f"{cls} {form}", text, states, "", numbers)


OPTIMIZERS = [
    Drawn(
        "NpuFusedSGD",
        "optimizers.NpuFusedSGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1)",
        ("momentum_buffer",),
        "torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False)",
        (("momentum", "0.5"),),
    ),
    _adam("NpuFusedAdam", "Adam"),
    _adam("NpuFusedAdam amsgrad", "Adam", ", amsgrad=True", ", amsgrad=True"),
    _adam("NpuFusedAdamW", "AdamW"),
    _adam("NpuFusedAdamW state_dtype", "AdamW", ", state_dtype=F32"),
    _adam("NpuFusedAdam flatten", "Adam", ', flatten="params"'),
    Drawn("NpuFusedLamb", "optimizers.NpuFusedLamb(ps, lr=0.05, weight_decay=0.1)", _MOMENTS, "", _BETAS),
    Drawn(
        "NpuFusedRMSpropTF",
        "optimizers.NpuFusedRMSpropTF(ps, lr=0.05, momentum=0.9, weight_decay=0.1)",
        ("square_avg", "momentum_buffer"),
        "",
        (("momentum", "0.5"), ("alpha", "0.8")),
    ),
    Drawn("lion", "optimizers.lion(ps, lr=0.05, weight_decay=0.1)", ("exp_avg",), "", (("beta1", "0.8"),)),
    Drawn("rule with a total", "clipped(ps, lr=0.05)", ("buf",), "", (("mu", "0.5"),)),
    _torch("Adam", "foreach", _MOMENTS, "", *_BETAS),
    _torch("AdamW", "loop", _MOMENTS, "", *_BETAS),
    _torch("SGD", "foreach", ("momentum_buffer",), ", momentum=0.9", ("momentum", "0.5")),
    _torch("RMSprop", "loop", ("square_avg",), "", ("alpha", "0.8")),
    Drawn("Drawing", "Drawing(ps, lr=0.05)", ("m",)),
    Drawn("Counting", "Counting(ps, lr=0.05)", ("unused",), "", (("mu", "0.5"),)),
    Drawn("Keeping", "Keeping(ps, lr=0.05)", ("slow",), "", (("mu", "0.5"),)),
]
BY_NAME = {o.name: o for o in OPTIMIZERS}
