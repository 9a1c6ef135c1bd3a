"""Checks of what a compiled step needs on this machine; each finding names a remedy if something is missing.

Nothing here imports torch while loading: an installation in which `import torch` fails is a finding too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import pathlib
import platform
import warnings
from collections.abc import Callable, Iterator

from npu_fuse_pass.tools.selftest.private import anonymous, first_line

INSTALL = (
    "a machine with an Ascend NPU, its driver and CANN is needed; there source CANN's set_env.sh and "
    'pip install "npu-fuse-pass[npu]" torch==VERSION, with the version that you have (without it pip takes the newest '
    "torch_npu and torch)"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: of the check.
        value: the result, or the failure.
        remedy: what to do; "" if nothing is missing.
        needed: nothing can be compiled on the platform without it.
    """

    name: str
    value: str
    remedy: str = ""
    needed: bool = False

    def __str__(self) -> str:
        mark = "ok" if not self.remedy else "MISSING" if self.needed else "note"
        return f"{mark:8}{self.name}: {self.value}" + (f"\n        -> {self.remedy}" if self.remedy else "")


class Missing(Exception):  # noqa: N818 - an answer
    """A check that fails: `args` are the value and the remedy."""


def findings(platform_name: str) -> Iterator[Finding]:
    """All findings for a platform ("cpu" or "npu"), in the order in which things depend on each other.

    Stops after the first needed one that is missing, because later ones would only repeat it; independent ones come
    first.
    """
    for name, (check, remedy, needed) in (_CHECKS["both"] | _CHECKS[platform_name]).items():
        yield (found := _asked(name, check, remedy, needed))
        if found.needed and found.remedy:
            return


def _asked(name: str, check: Callable[[], str], remedy: str, needed: bool) -> Finding:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = check()
    except Missing as e:
        return Finding(name, e.args[0], e.args[1], needed)
    except Exception as e:  # a broken installation may raise anything
        return Finding(name, first_line(e), remedy, needed)
    ours = [anonymous(str(w.message)) for w in caught if "npu_fused" in str(w.message)]
    return Finding(name, value, ours[0] if ours else "", needed and not ours)


def _version_of(package: str) -> str:
    return importlib.metadata.version(package)


def _torch() -> str:
    try:
        torch = importlib.import_module("torch")
    except RuntimeError as e:  # import torch loads every installed backend
        remedy = "torch loads torch_npu by itself, and torch_npu does not find CANN's libraries"
        raise Missing(first_line(e), f"{remedy}: source CANN's set_env.sh first, or uninstall torch_npu") from e
    return str(torch.__version__)


def _optimizers() -> str:
    library = importlib.import_module("optimizers")
    if not hasattr(library, "NpuFusedAdam"):
        raise Missing(
            "another module of that name", "run the selftest from a folder without an optimizers.py of your own"
        )
    return "importable"


def _compiler() -> str:
    """Compile, cache, load and call one function."""
    from npu_fuse_pass.lowerings.cpu import build as cpu_build
    from npu_fuse_pass.lowerings.cpu.compiler import compiler

    name = compiler()
    if name is None:
        raise Missing("none found", "install g++ or clang++, or set CXX (the CPU lowering needs it)")
    library = cpu_build.load('extern "C" int npu_fuse_selftest() { return 7; }', ["npu_fuse_selftest"])
    if library.npu_fuse_selftest() != 7:
        raise Missing(f"{name} builds libraries that do not work", "set CXX to another compiler")
    return f"{name.split()[0]} compiles, and the library loads"


def _protobuf() -> str:
    version = _version_of("protobuf")
    if int(version.split(".")[0]) < 4:
        raise Missing(version, "pip install 'protobuf>=4': with 3.x torchair's conversion is many times slower")
    return version


def _torch_npu() -> str:
    importlib.import_module("torch_npu")
    version = _version_of("torch_npu")
    return version if version.startswith("2.13.0") else f"{version} (this package was tested with 2.13.0)"


def _torchair() -> str:
    from npu_fuse_pass.lowerings.npu.environment import require

    require()
    return "loads, with our converters registered"


def _shell() -> str:
    if not os.environ.get("ASCEND_HOME_PATH"):
        raise Missing("ASCEND_HOME_PATH is not set", "source CANN's set_env.sh in this shell")
    return "ASCEND_HOME_PATH is set"


def _driver() -> str:
    nodes = [path for path in pathlib.Path("/dev").glob("davinci*") if path.name[7:].isdigit()]
    if not nodes:
        raise Missing("no davinci devices in /dev", "install the driver; a container must be given the devices")
    return f"{len(nodes)} davinci devices in /dev"


def _cann() -> str:
    import torch_npu

    version = torch_npu.npu.utils.get_cann_version()
    if not version:
        raise Missing("torch_npu finds no version", "install CANN, and source its set_env.sh in this shell")
    return str(version)


def _device() -> str:
    import torch

    npu = torch.get_device_module("npu")
    if not npu.is_available():
        raise Missing("torch.npu finds none", INSTALL)
    return f"{npu.device_count()} x {npu.get_device_name(0)}"


_Check = tuple[Callable[[], str], str, bool]

# name -> check, remedy if it raises, needed
_CHECKS: dict[str, dict[str, _Check]] = {
    "both": {
        "system": (lambda: f"{platform.system()} {platform.machine()}", "", False),
        "Python": (platform.python_version, "", False),
        "npu-fuse-pass": (lambda: str(importlib.import_module("npu_fuse_pass").__version__), "", False),
        "torch": (_torch, "pip install torch", True),
        "sympy": (lambda: _version_of("sympy"), "pip install sympy: without it no known kernel is recognised", False),
        "optimizers": (_optimizers, "install this package again: its second top-level package is missing", True),
    },
    "cpu": {"C++ compiler and kernel cache": (_compiler, "set CXX to a working C++ compiler", True)},
    "npu": {
        "C++ compiler and kernel cache": (_compiler, "only the CPU lowering needs one: set CXX", False),
        "CANN's environment": (_shell, "", False),
        "NPU driver": (_driver, "", False),
        "protobuf": (_protobuf, "pip install 'protobuf>=4': torchair needs it and does not declare it", False),
        "torch_npu": (_torch_npu, INSTALL, True),
        "torchair": (_torchair, INSTALL, True),
        "CANN": (_cann, INSTALL, False),
        "NPU": (_device, INSTALL, True),
    },
}
