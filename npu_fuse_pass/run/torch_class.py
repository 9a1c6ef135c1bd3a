"""`check_numerics` beside torch's own class, uncompiled: it sees what both of this package's programs have in common.

The fused step and the original one of a rule optimizer read the same states, counters and numbers. Where those lie
wrongly (two states in one place, one parameter's beside another's), both are wrong alike; torch's class, on copies of
what the optimizer shows, is not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import NumericsError
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules.hooks import silenced
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.run.check_numerics import names_of, one_not_finite, relative_error
from npu_fuse_pass.tensors.memory import lie_apart
from npu_fuse_pass.tensors.sharded import local
from npu_fuse_pass.tolerances import CHECKED_RULE, CHECKED_UNCOMPILED


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """A step of torch's class that is to be made of copies.

    Attributes:
        optimizer: of torch's class.
        checked: the optimizer whose step is checked; the copies are copies of its parameters.
        restore: it is of torch's class as well, whose step rounds after every operation; a rule rounds what it stores
            and nothing before. Where there is a difference, its tensors get the values of the copies.
    """

    optimizer: torch.optim.Optimizer
    checked: torch.optim.Optimizer
    restore: bool = False

    @property
    def name(self) -> str:
        return f"torch.optim.{type(self.optimizer).__name__}"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compare(self, report: CompileReport) -> None:
        """Make the step and compare, after the step that is checked, and note it in the report of that.

        Raises:
            NumericsError: a parameter or a state differs by more than its dtype's tolerance.
        """
        report.checked_against[1:] = [self.name]
        step, names = report.checked_steps, names_of([self.checked])
        twins, params = (
            [p for group in opt.param_groups for p in group["params"]] for opt in (self.optimizer, self.checked)
        )
        before = [_tensors(p, self.optimizer.state.get(p, {})) for p in twins]
        old = [{name: t.detach().clone() for name, t in tensors.items()} for tensors in before]
        with torch.random.fork_rng(devices=[]), silenced():
            self.optimizer.step()
        pairs = [
            (_tensors(twin, self.optimizer.state.get(twin, {})), _tensors(param, self.checked.state.get(param, {})))
            for twin, param in zip(twins, params, strict=True)
        ]
        for place, (want, got) in enumerate(pairs):
            for name in want.keys() & got.keys():
                wanted = one_not_finite(want[name].reshape(got[name].shape))
                error = relative_error(one_not_finite(got[name]), wanted, old[place].get(name))
                dtype = got[name].dtype.to_real() if got[name].is_complex() else got[name].dtype
                limit = (CHECKED_UNCOMPILED if self.restore else CHECKED_RULE).get(dtype, 0.0)
                limit = max(limit, self._of_counters()) if self.restore else limit
                if error > limit:
                    if self.restore:
                        _restore(pairs)
                    param = params[place]
                    where = f"{names.get(id(param), f'parameter {place}')} {tuple(param.shape)}"
                    raise NumericsError(self._text(step, name, where, error, limit), "", where, name, error, step)

    def _of_counters(self) -> float:
        """The relative error of 1 - beta in float32, which is that of a step counter."""
        betas = (float(beta) for group in self.optimizer.param_groups for beta in group.get("betas", ()))
        return max((torch.finfo(torch.float32).eps / (1 - beta) for beta in betas if beta < 1), default=0.0)

    def _text(self, step: int, tensor: str, where: str, error: float, limit: float) -> str:
        blame = (
            "The tensors hold what torch's class gives: the fault is in what was captured of it, or in its rule"
            if self.restore
            else "Both programs of this package agree, and the tensors hold what they give: the fault is in what they "
            "share, the rule, its hyperparameters, or where states lie"
        )
        return (
            f"step {step} of this compile: {tensor!r} of {where} differs by {error:.3g} relative from what an "
            f"uncompiled step of {self.name} makes of the same parameters, gradients and states (allowed: {limit:g}). "
            f"{blame} (docs/numerics.md)"
        )


def of_stock(
    opt: torch.optim.Optimizer, twin: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
) -> TorchStep | None:
    """The step of an optimizer of torch.optim on a copy that `twin` makes; None for any other class."""
    if not type(opt).__module__.startswith("torch.optim.") or not hasattr(torch.optim, type(opt).__name__):
        return None
    return TorchStep(twin(opt), opt, restore=True)


def of_rule(opt: RuleOptimizer) -> TorchStep | None:
    """Torch's class for a rule optimizer, on copies in float64 of what it shows; None where torch has none.

    States that no step has made yet are left for torch to make.
    """
    owner: Any = next(c for c in type(opt).__mro__ if "torch_class" in vars(c))
    cls: Any = owner.torch_class
    own_parts = type(opt).partitions is not RuleOptimizer.partitions
    if (
        cls is None
        or own_parts
        or opt.master_weights
        or opt.stochastic_rounding
        or opt.rule is not owner.rule
        or type(opt).rule_for is not RuleOptimizer.rule_for
    ):
        return None
    known = inspect.signature(cls).parameters
    groups = []
    if not lie_apart([local(p) for group in opt.param_groups for p in group["params"]]):  # as copies would
        return None
    for group in opt.param_groups:
        copies = [_copy(p) for p in group["params"]]
        options = {k: _number(v) for k, v in opt.hyperparameters(group).items() if k in known and k != "params"}
        groups.append({**options, "params": copies})
    made = cls(groups, foreach=False)
    for copied, group in zip(made.param_groups, opt.param_groups, strict=True):
        for twin, p in zip(copied["params"], group["params"], strict=True):
            if opt.state.get(p):
                made.state[twin] = {k: v.detach().double().clone() for k, v in opt.state[p].items() if v is not None}
    return TorchStep(made, opt)


def _copy(p: Tensor) -> Tensor:
    made = torch.nn.Parameter(p.detach().double().clone())
    made.grad = None if p.grad is None else p.grad.detach().double().clone()
    return made


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return tuple(map(_number, value)) if isinstance(value, (tuple, list)) else value


@torch.no_grad()
def _restore(pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> None:
    for want, got in pairs:
        for name in want.keys() & got.keys():
            got[name].copy_(want[name])


def _tensors(param: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a step writes of a parameter, by name, as far as it is here; no counters, which torch keeps in float32."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "step"}
    found = {"param": param.detach(), **{k: v for k, v in tensors.items() if v.is_floating_point() or v.is_complex()}}
    return {name: local(t) for name, t in found.items()}
