"""What Paddle's optimizers have around their update: learning rate or scheduler, minimize, clear_grad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler as TorchLRScheduler

from npu_fuse_pass.rules.optimizer import RuleOptimizer, eager_prelude

from ._minimize import is_cleared, mark_cleared, minimize
from ._number import as_float
from .clip import ClipGradByGlobalNorm, GradientClipBase
from .lr import LRScheduler
from .regularizer import as_regularizer

__all__ = ["PaddleOptimizer"]


class PaddleOptimizer(RuleOptimizer):
    """Base of Paddle's classes: learning rate, clipping and regularisation are options of parameter groups.

    A group holds `lr`, the global learning rate, which torch's schedulers and `set_lr` write, and
    `learning_rate`, a factor of its own. A rule of a derived class gets their product as `lr`, and `clip`,
    `clip_min`, `clip_max`, `regularizer` and `coefficient`.

    Args:
        learning_rate: a float, or a scheduler that is asked at every step.
        parameters: parameters or parameter groups.
        defaults: the other hyperparameters of the groups, with weight_decay and grad_clip among them.
        name: kept as an attribute without effect.
        options: those of every `RuleOptimizer`, by name.
    """

    def __init__(
        self,
        learning_rate: float | LRScheduler | TorchLRScheduler,
        parameters: Any,
        defaults: dict[str, Any],
        name: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(learning_rate, (float, LRScheduler, TorchLRScheduler)):
            raise TypeError(f"learning rate should be float or LRScheduler, got {type(learning_rate)} here")
        if parameters is None:
            raise AttributeError("parameters argument given to the Optimizer should not be None.")
        if isinstance(parameters, (Tensor, dict)) or not isinstance(parameters, Iterable):
            raise TypeError(f"parameters should be a list of Tensors or of dicts, got {type(parameters)} here")
        self.name = name
        self._scheduler = None if isinstance(learning_rate, float) else learning_rate
        lr = learning_rate if isinstance(learning_rate, float) else _current(learning_rate)
        super().__init__(parameters, {"lr": lr, "learning_rate": 1.0, **defaults}, **options)

    # Parameter groups ---------------------------------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a group with options that are not allowed; derived classes add their own checks."""
        factor = group["learning_rate"]
        if not isinstance(factor, (float, int)):
            raise TypeError(f"learning_rate of a parameter group is a factor: float, not {type(factor)}")
        as_float("learning_rate", factor)
        as_float("lr", group["lr"])
        as_regularizer(group["weight_decay"])
        clip = group["grad_clip"]
        if clip is not None and not (isinstance(clip, GradientClipBase) and clip.kind is not None):
            raise TypeError(f"'grad_clip' should be an instance of GradientClipBase's derived class, got {type(clip)}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; `learning_rate` among them is a factor of the global one.

        A parameter that is listed twice in a group is a warning, as in torch, and is updated once (in Paddle:
        twice); one that is in another group already is an error.

        Raises:
            TypeError: an option is of a wrong type. Nothing is changed then.
            ValueError: an option has a value that is not allowed, or a parameter is in another group.
        """
        if isinstance(param_group, dict):
            self.check_group(self.complete(param_group))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        first = {p: i for i, p in reversed(list(enumerate(group["params"])))}
        if len(first) < len(group["params"]):
            for key in group.keys() & {"params", "param_names"}:
                group[key] = [group[key][i] for i in sorted(first.values())]

    def saved_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """As in the base class; also refuses options of a wrong type. The state of a scheduler is not part of it."""
        self.check_group(self.complete(group))
        return super().saved_group(group)

    def hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the rule, from this step's options of a group."""
        if self._scheduler is not None:
            group["lr"] = _current(self._scheduler)
        lr = group["lr"] if isinstance(group["lr"], Tensor) else as_float("lr", group["lr"])
        clip: GradientClipBase | None = group["grad_clip"]
        low, high = (0.0, 0.0) if clip is None else clip.bounds()
        return {
            **group,
            "lr": lr * group["learning_rate"],
            "clip": None if clip is None else clip.kind,
            "clip_min": low,
            "clip_max": high,
            **_decay(group["weight_decay"]),
        }

    def partitions(self, group: dict[str, Any]) -> list[tuple[list[Tensor], Mapping[str, Any]]]:
        """The parameters of a group by their `p.regularizer` and `p.need_clip`, Paddle's ParamAttr."""
        params: list[Tensor] = group["params"]
        if not any(_is_special(p) for p in params):
            return [(params, {})]
        parts: dict[tuple[Any, ...], tuple[list[Tensor], Mapping[str, Any]]] = {}
        for p in params:
            own = getattr(p, "regularizer", None)
            extra = {} if own is None else _decay(own)
            if getattr(p, "need_clip", True) is False:
                extra["clip"] = None
            parts.setdefault(tuple(extra.items()), ([], extra))[0].append(p)
        return list(parts.values())

    # Learning rate ------------------------------------------------------------------------------------------

    def get_lr(self) -> float:
        """The global learning rate of this step, without the factors of parameter groups."""
        return float(self.param_groups[0]["lr"] if self._scheduler is None else _current(self._scheduler))

    def set_lr(self, value: float) -> None:
        """Set the global learning rate.

        Raises:
            TypeError: the value is not a float or int.
            RuntimeError: the learning rate is a scheduler.
        """
        if not isinstance(value, (int, float)):
            raise TypeError(f"The type of 'value' in optimizer.set_lr must be float, but received {type(value)}.")
        if self._scheduler is not None:
            raise RuntimeError(
                "optimizer's learning rate can't be LRScheduler when invoke this API, "
                "because this will lead to conflict."
            )
        for group in self.param_groups:
            group["lr"] = float(value)

    # Stepping -----------------------------------------------------------------------------------------------

    @eager_prelude
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. As in Paddle there is no closure."""
        super().step()

    def before_step(self) -> None:
        """Note which gradients are cleared ones: clipping writes them, which is not producing new ones."""
        written = [g["params"] for g in self.param_groups if isinstance(g["grad_clip"], ClipGradByGlobalNorm)]
        self._cleared = [p for params in written for p in params if is_cleared(p)]

    def after_step(self) -> None:
        """Cleared gradients stay marked as such."""
        mark_cleared(self._cleared)
        self._cleared = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch.optim does: None, or zeros with set_to_none=False."""
        super().zero_grad(set_to_none)
        mark_cleared(p for group in self.param_groups for p in group["params"])

    def clear_grad(self, set_to_zero: bool = True) -> None:
        """Clear the gradients as Paddle does: zeros, or None with set_to_zero=False."""
        self.zero_grad(set_to_none=not set_to_zero)

    clear_gradients = clear_grad

    def minimize(
        self,
        loss: Tensor,
        startup_program: None = None,
        parameters: Iterable[Tensor | str] | None = None,
        no_grad_set: Iterable[Tensor | str] | None = None,
    ) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
        """Run backward, unless a gradient was produced since gradients were last cleared, then update.

        Call clear_grad() after it: else the next call finds the old gradients and uses them again; it warns.

        Args:
            loss: what to minimise.
            startup_program: must be None: Paddle's static graphs are out of scope.
            parameters: update these only; parameters, or names where the optimizer was given named ones. None
                or an empty list means all.
            no_grad_set: do not update these; as `parameters`.

        Returns:
            ([], [(p, p.grad), …]): there are no operators, and the parameters that were updated.

        Raises:
            TypeError: the loss is not a Tensor, or a list holds something else than parameters and names.
            ValueError: there is a startup_program, or a parameter is not one of this optimizer.
        """
        if startup_program is not None:
            raise ValueError("startup_program must be None: static graphs are out of scope")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss should be a Tensor, got {type(loss)} here")
        return minimize(self, loss, parameters, no_grad_set)


def _current(scheduler: LRScheduler | TorchLRScheduler) -> float:
    return float(scheduler() if isinstance(scheduler, LRScheduler) else scheduler.get_last_lr()[0])


def _is_special(param: Tensor) -> bool:
    return getattr(param, "regularizer", None) is not None or getattr(param, "need_clip", True) is False


def _decay(weight_decay: object) -> dict[str, Any]:
    regularizer = as_regularizer(weight_decay)
    if regularizer is None:
        return {"regularizer": None, "coefficient": 0.0}
    return {"regularizer": regularizer.kind, "coefficient": regularizer.coeff}
