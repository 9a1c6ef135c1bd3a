"""Forms of an NPU program, tried in turn: generated kernels, GE operations, elementwise ones alone.

A form is refused when it is converted, or loaded, compiled and first run; nothing has changed then (`execution`), so
the next one starts from the same values. Where the last one is refused, too, the caller runs the original.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from npu_fuse_pass.errors import GraphRefused, Unsupported
from npu_fuse_pass.ir.types import LeafValues
from npu_fuse_pass.lowerings.npu.ge_texts import Texts
from npu_fuse_pass.lowerings.npu.program import Program
from npu_fuse_pass.user_warnings import warn

log = logging.getLogger(__name__)

_WITHOUT = {"generated": "generated kernels"}


class RetryingProgram:
    """A program of several forms, with the interface of `npu.Program`; `chosen` is the one that runs.

    Args:
        build: makes the program for a value of the option `kernels`, with the values of all leaves if known.
        forms: such values, in the order of tries.
        values: of all leaves, if known; not kept.
        show: updates the report: gets the program that runs now, and why the one before it does not.
        started: called after the first step of a form.
        texts: GE graphs of the program that runs now, where a dump is asked for.

    Raises:
        GraphRefused: torchair converts none of the forms.
        Unsupported: the only form has no GE operation for something.
    """

    written = False  # a graph runs as a whole

    def __init__(
        self,
        build: Callable[[str, LeafValues | None], Program],
        forms: Sequence[str],
        values: LeafValues | None,
        show: Callable[[Program, str | None], None],
        started: Callable[[Program], None],
        texts: Texts | None = None,
    ) -> None:
        self._build, self._show, self.texts = build, show, texts
        self._forms, self._started, self._running = list(forms), started, False
        try:
            self.chosen = build(self._forms[0], values)
        except GraphRefused as e:
            self.chosen = self._next(e, values)
        else:
            show(self.chosen, None)

    @property
    def begun(self) -> bool:
        """As of the program that runs now."""
        return self.chosen.begun

    @begun.setter
    def begun(self, value: bool) -> None:
        self.chosen.begun = value

    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None:
        """Run the step, as `npu.Program`; on refusal with the next form."""
        said = []
        while True:
            try:
                self.chosen(values, complete)
                break
            except GraphRefused as e:
                if all(lowered.plain for lowered in self.chosen.groups):
                    raise
                without = _WITHOUT.get(self._forms[0], "dedicated operations")
                self.chosen = self._next(e, values)
                said.append(f"npu_fused: this step runs without {without}: {e.reason.advised}")
        for text in said:
            warn(text)
        if not self._running:
            self._running = True
            self._started(self.chosen)

    def _next(self, refused: GraphRefused, values: LeafValues | None) -> Program:
        """Make the next form that is not refused; refused forms are not tried again."""
        while len(self._forms) > 1:
            before = self._forms.pop(0)
            log.info("trying %s, not %s: %s", self._forms[0], before, refused)
            try:
                program = self._build(self._forms[0], values)
            except Unsupported as e:
                raise GraphRefused(f"{refused} (and there is no form of GE operations: {e})") from refused
            except GraphRefused as e:
                refused = e
                continue
            self._show(program, refused.reason.advised)
            return program
        raise refused
