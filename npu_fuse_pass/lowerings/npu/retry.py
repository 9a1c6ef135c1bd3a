"""Two forms of an NPU program: with dedicated operations, and elementwise where GE refuses those.

GE refuses a graph when it is converted, or loaded, compiled and first run; nothing has changed then (`execution`), so
the other form starts from the same values. Where GE refuses that one, too, the caller runs the original.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from npu_fuse_pass.errors import GraphRefused, Unsupported
from npu_fuse_pass.lowerings.npu.ge_texts import Texts
from npu_fuse_pass.lowerings.npu.program import Program
from npu_fuse_pass.user_warnings import warn

log = logging.getLogger(__name__)


class Retried:
    """The interface of `npu.Program`; `chosen` is the one that runs.

    Args:
        build: the program for a value of the option `kernels`, with the values of all leaves where they are known.
        kernels: the option.
        values: of all leaves, if they are known; not kept.
        show: brings the report up to date: the program that runs now, and why the one before it does not.
        texts: GE graphs of the program that runs now, where a dump is asked for.

    Raises:
        GraphRefused: torchair converts neither form.
    """

    def __init__(
        self,
        build: Callable[[str, list[Tensor | None] | None], Program],
        kernels: str,
        values: list[Tensor | None] | None,
        show: Callable[[Program, str | None], None],
        texts: Texts | None = None,
    ) -> None:
        self._build, self._show, self.texts = build, show, texts
        try:
            self.chosen = build(kernels, values)
        except GraphRefused as e:
            if kernels == "elementwise":
                raise
            self.chosen = self._elementwise(e, values)
        else:
            show(self.chosen, None)

    def __call__(self, values: list[Tensor | None], complete: bool = False, kinds: object = None) -> None:
        """Run the step; as `npu.Program`."""
        try:
            self.chosen(values, complete)
        except GraphRefused as e:
            if all(part.plain for part in self.chosen.parts):
                raise
            self.chosen = self._elementwise(e, values)
            self.chosen(values, complete)
            warn(f"npu_fused: this step runs without dedicated operations: {e.reason.advised}")

    def _elementwise(self, refused: GraphRefused, values: list[Tensor | None] | None) -> Program:
        log.info("trying without dedicated operations: %s", refused)
        try:
            program = self._build("elementwise", values)
        except Unsupported as e:
            raise GraphRefused(f"{refused} (and there is no elementwise form: {e})") from refused
        self._show(program, refused.reason.advised)
        return program
