"""Execution of the GE graph: a first run that can be undone, and later ones that cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import GraphRefused, StepFailedError

_SEND = "Please report it, with this message and what print(npu_fuse_pass.reports()[-1]) says"


class Execution:
    """A graph compiled by torchair. GE loads and compiles it at the first call, which is where it refuses.

    Args:
        compiled: torchair's callable, or what launches kernels without a graph.
        versions: describes the environment for error messages.
        refusing: what it means that the first call fails.
    """

    def __init__(
        self,
        compiled: Callable[..., Sequence[Tensor]],
        versions: Callable[[], str],
        refusing: str = "GE refused this step's graph when it was loaded, compiled or first run",
    ) -> None:
        self.compiled = compiled
        self._versions, self._refusing = versions, refusing
        self._works = False

    def __call__(self, inputs: Sequence[Tensor], written: Sequence[int]) -> Sequence[Tensor]:
        """Run the graph.

        Args:
            inputs: of the graph.
            written: which of them it writes to.

        Raises:
            GraphRefused: the first run failed; all inputs have their old values.
            StepFailedError: a later run failed.
        """
        if not self._works:
            results = self._first(inputs, [inputs[i] for i in written])
            self._works = True
            return results
        try:
            return self.compiled(*inputs)
        except Exception as e:
            # GE writes in place, in an order of its own, and it is unknown how far it came: the original step on top
            # of that could apply a part of the update twice, silently. Undoing it would take a copy of all parameters
            # and states at every step, for what happens once in the life of a device. So this one is the user's.
            lead = (
                "a step failed on the device, in a program that had run before: parameters and states may be partly "
                "updated. Nothing was retried; go on from a checkpoint"
            )
            raise StepFailedError(f"{refusal(lead, e, self._versions())}. {_SEND}") from e

    def _first(self, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run with a backup of written tensors in host memory: the device's may be full."""
        before = [t.to("cpu", copy=True) for t in written]
        try:
            results = self.compiled(*inputs)
            wait_for({t.device for t in written})  # an NPU reports what fails in a kernel when it is waited for
        except BaseException as e:
            self._undo(written, before, e)
            if not isinstance(e, Exception):
                raise
            raise GraphRefused(refusal(f"{self._refusing}; nothing was changed", e, self._versions())) from e
        return results

    def _undo(self, written: Sequence[Tensor], before: Sequence[Tensor], cause: BaseException) -> None:
        try:
            for t, value in zip(written, before, strict=True):
                t.copy_(value)
            wait_for({t.device for t in written})
        except Exception as e:
            lead = f"the first run of a step failed on the device, and then undoing it: {_first_words(e)}; the run"
            raise StepFailedError(f"{refusal(lead, cause, self._versions())}. {_SEND}") from cause


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until the devices are idle."""
    for device in devices:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)


def refusal(lead: str, error: BaseException, versions: str) -> str:
    """An error message with all that is needed for diagnosis on another machine."""
    return f"{lead}: {_first_words(error)} [{versions}]"


def _first_words(error: BaseException) -> str:
    """The text of an error without what torchair and FX append to it: tracebacks, and the node with all it holds."""
    text = re.split(r"\n+(?:Traceback \(most recent call last\)|While executing )", str(error))[0].strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
