"""torch's fake tensors, used to make GE graphs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from npu_fuse_pass.private_torch import find, need

_FAKE_TENSOR = "torch._subclasses.fake_tensor.FakeTensor"
_FAKE_MODE = "torch._subclasses.fake_tensor.FakeTensorMode"
_NO_DISPATCH = "torch.utils._mode_utils.no_dispatch"
_TRACING, _CONTEXT = "torch._guards.tracing", "torch._guards.TracingContext"

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.utils._mode_utils import no_dispatch as no_dispatch
else:
    FakeTensor, FakeTensorMode, no_dispatch = find(_FAKE_TENSOR), find(_FAKE_MODE), find(_NO_DISPATCH)


def check() -> None:
    """Refuse a torch that allows no GE graph.

    Raises:
        Unsupported: names the private name that it lacks.
    """
    for name in (_FAKE_TENSOR, _FAKE_MODE, _NO_DISPATCH, _TRACING, _CONTEXT):
        need(name)


def while_traced(mode: Any) -> contextlib.AbstractContextManager[Any]:
    """A context for torchair's compile, which asks torch for the mode of the graph's fake tensors."""
    return need(_TRACING)(need(_CONTEXT)(mode))  # type: ignore[no-any-return]
