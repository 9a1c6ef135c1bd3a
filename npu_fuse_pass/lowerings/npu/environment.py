"""What the NPU's lowering needs of its environment: torch_npu, torchair and CANN, imported when they are asked for."""

from __future__ import annotations

import sys
from typing import Any

import torch

from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.lowerings.npu.graph import converters, list_converters

_INSTALL = (
    'platform "npu" needs torch_npu, which carries torchair, and CANN: pip install "npu-fuse-pass[npu]" '
    "(torch_npu for this torch, protobuf>=4) where CANN's set_env.sh has been sourced"
)


def require() -> Any:
    """The torchair module, with converters for the fused nodes registered.

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
    """Register the converters where torchair runs already: it has called `fuse_pass`, and will meet the fused nodes."""
    if "torchair" in sys.modules:
        require()


def is_config(value: object) -> bool:
    """Whether a value is torchair's CompilerConfig; where nothing has imported torchair yet, there is none."""
    torchair = sys.modules.get("torchair")
    return torchair is not None and isinstance(value, torchair.CompilerConfig)


def versions() -> str:
    """What a bug report needs to know of the environment, as far as it can be found out."""
    import torch_npu

    asked = {
        "torch": lambda: torch.__version__,
        "torch_npu": lambda: torch_npu.__version__,
        "CANN": torch_npu.npu.utils.get_cann_version,
        "chip": torch_npu.npu.get_device_name,
    }
    found = []
    for name, ask in asked.items():
        try:
            found.append(f"{name} {ask() or 'unknown'}")
        except Exception:  # this is asked where something is broken already
            found.append(f"{name} unknown")
    return ", ".join(found)


def chip() -> str:
    """The name of the chip that torch_npu would run on, "" where it cannot tell."""
    import torch_npu

    try:
        return str(torch_npu.npu.get_device_name() or "")
    except Exception:  # without a driver there is no device to ask for
        return ""
