"""torch learns the backend's name from a rule optimizer, ahead of `torch.compile(..., backend="npu_fused")`.

By itself it looks a name up when it is first asked for, and where several threads ask at once it refuses all but one.
The backend itself is imported at the end of the first compile, when Dynamo has traced it; so what concerns Dynamo has
to be in place before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from typing import Any

from npu_fuse_pass.private_torch import find
from npu_fuse_pass.rules.clipping import let_clipping_be_captured
from npu_fuse_pass.rules.torch_steps import look_after_compiled_steps
from npu_fuse_pass.rules.tracing import look_after_compiles

_lock = threading.Lock()


def prepare() -> None:
    """Have torch ask this package where compiles begin, and Dynamo do what it does otherwise for this backend."""
    look_after_compiled_steps()
    look_after_compiles()
    let_clipping_be_captured()


def register_backend() -> None:
    """Register the name, if it is not registered."""
    with _lock:
        prepare()
        _register()


@functools.cache
def _register() -> None:
    make_known = find("torch._dynamo.register_backend")
    if make_known is not None:
        with contextlib.suppress(AssertionError):  # it is registered already
            make_known(_npu_fused, name="npu_fused")


def _npu_fused(*args: Any, **kwargs: Any) -> Any:
    """The backend, which takes a second to import, so it is imported at the first compile."""
    return importlib.import_module("npu_fuse_pass.backend").npu_fused(*args, **kwargs)
