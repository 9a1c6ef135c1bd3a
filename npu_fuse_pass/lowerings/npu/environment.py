"""Access to the environment of the NPU lowering: torch_npu, torchair and CANN, imported on demand."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from npu_fuse_pass.errors import FuseError, GraphRefused, PlatformError
from npu_fuse_pass.lowerings.npu.execution import refusal
from npu_fuse_pass.lowerings.npu.graph import converters, list_converters
from npu_fuse_pass.lowerings.npu.kernels.ascend import machine

_INSTALL = (
    'platform "npu" needs torch_npu, which carries torchair, and CANN: pip install "npu-fuse-pass[npu]" '
    f"torch=={torch.__version__.partition('+')[0]} (without the version pip takes the newest torch_npu and torch) "
    "where CANN's set_env.sh has been sourced"
)


def require() -> Any:
    """Import torchair and register converters for the fused nodes. Returns the module.

    Raises:
        PlatformError: torch_npu or torchair is missing or does not load; says what to install.
    """
    try:
        import torch_npu  # noqa: F401  (it puts torchair on the path)
        import torchair
    except (ImportError, OSError, RuntimeError) as e:
        raise PlatformError(f"{_INSTALL}. Here: {type(e).__name__}: {e}") from e
    converters.register(torchair)
    from torchair._ge_concrete_graph import ge_apis

    list_converters.register(torchair, ge_apis)
    return torchair


def serve() -> None:
    """Register the converters if torchair is loaded: it has called `fuse_pass`, and will meet the fused nodes."""
    if "torchair" in sys.modules:
        require()


def is_config(value: object) -> bool:
    """True if a value is torchair's CompilerConfig; False before torchair is imported."""
    torchair = sys.modules.get("torchair")
    return torchair is not None and isinstance(value, torchair.CompilerConfig)


def versions() -> str:
    """The versions for a bug report, as far as they are known."""
    return ", ".join(f"{name} {found}" for name, found in {"torch": torch.__version__, **machine()}.items())


def chip() -> str:
    """The chip's name from torch_npu; "" if unknown."""
    found = machine()["chip"]
    return "" if found == "unknown" else found


@contextlib.contextmanager
def conversion() -> Iterator[None]:
    """What torchair raises inside is its refusal of the step's graph.

    Raises:
        GraphRefused: holds that, and the versions.
    """
    try:
        yield
    except FuseError:
        raise
    except Exception as e:
        raise GraphRefused(refusal("torchair does not convert this step's graph", e, versions())) from e
