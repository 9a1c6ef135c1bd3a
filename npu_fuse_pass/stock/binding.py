"""An optimizer of torch.optim whose updates are made by a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import internal, is_internal
from npu_fuse_pass.reasons import Reason
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.stock.classes import StockClass, original_step
from npu_fuse_pass.stock.prelude import Refused, StockPrelude


class Binding:
    """What `core_op` steps for an optimizer of torch.optim.

    Attributes:
        core: the captured operation; the caller replaces it by its compiled form.
        refused: why the rule does not compute its steps.
    """

    has_hooks = False
    found_inf: Tensor | None = None  # GradScaler skips whole steps of torch.optim's classes

    def __init__(self, opt: torch.optim.Optimizer, known: StockClass) -> None:
        self.optimizer = opt
        self.refused: Reason | None = None
        self._class = known
        self._prelude = StockPrelude(opt, known)
        self._replaces = f"torch.optim.{type(opt).__name__}"
        self._surface = core_op.Surface(opt.param_groups, core_op.register(self))
        self.ticket = core_op.make_ticket(self._surface.handle)
        self.core: Callable[[Tensor], None] = core_op.newest.core

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's own."""
        return self.optimizer.state

    def why_not(self) -> Reason | None:
        """Why the rule does not compute the next step, as far as that is known before anything is prepared."""
        if not self._prelude.batches and self.refused is None:
            self.refused = self._prelude.refused_parameters()
        return self.refused or next((r for group in self.param_groups if (r := self._class.refused(group))), None)

    def update(self) -> None:
        """Update every parameter that has a gradient; what is around a step has been done.

        Raises:
            Refused: the rule does not compute this step, and nothing was updated.
        """
        try:
            self._prelude.prepare()
        except BaseException as e:  # whatever ends it (Ctrl-C) leaves batches of which some are bound anew
            self._prelude.begin_anew()
            if isinstance(e, Refused):
                self.refused = e.reason
            elif isinstance(e, Exception) and is_internal(e):
                self.refused = internal(e)
                raise Refused(self.refused) from e
            raise
        try:
            if self._prelude.unchanged or any(g is not None for b in self._prelude.batches for g in b.grads):
                self.core(self.ticket)
            self._after()
        except BaseException:
            self._prelude.expose_updated()
            raise

    def _before(self, closure: Callable[[], Any] | None, in_graph: bool = False) -> Any:
        raise AssertionError("a step of torch.optim is no part of a larger graph")

    def _after(self) -> None:
        self._prelude.expose_states()
        self._prelude.release_gradients()

    @torch.no_grad()
    def _run_original(self) -> None:
        """One step as torch makes it, in place of a compiled one."""
        self._prelude.begin_anew()
        original_step(self.optimizer)

    @torch.no_grad()
    def _run_beside(self) -> None:
        """The same on the tensors of a compiled one, to which it is compared."""
        original_step(self.optimizer)
        self._prelude.follow()
