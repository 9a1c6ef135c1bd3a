"""The machine with an NPU: CANN's compiler and its runtime, by ctypes. Nobody has run this on one.

What is assumed of CANN stands in docs/npu.md, in the list of what only CANN can answer.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import importlib.util
import pathlib
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from npu_fuse_pass.lowerings.npu.kernels.compiler import Compiler, Refused, find
from npu_fuse_pass.lowerings.npu.kernels.final_ir import facts
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel

_LIBRARY = "libascendcl.so"
_MAGIC, _VECTOR_CORE = 2, 0x41415246  # ACL_RT_BINARY_LOAD_OPT_MAGIC, ACL_RT_BINARY_MAGIC_ELF_VECTOR_CORE
_SYNC_ADDRESS = "ffts_base_address"
"""How the last IR names the first argument of a kernel that gets the address for synchronisation between cores."""


class Ascend:
    """`Hardware` by CANN: binaries of its compiler, launched by its runtime.

    Args:
        compiler: with hivmc.
        runtime: loads and launches.
        calls_back: whether GE calls a node's Python.
    """

    chunk: int | None = None

    def __init__(self, compiler: Compiler, runtime: AclRuntime, calls_back: bool) -> None:
        self._compiler, self._runtime = compiler, runtime
        self.target, self.identity, self.calls_back = compiler.target, compiler.identity, calls_back
        self._loaded: dict[str, _Loaded] = {}

    def last_ir(self, kernel: Kernel) -> str:
        return self._compiler.last_ir(kernel.text)

    def load(self, kernel: Kernel) -> None:
        if kernel.text in self._loaded:
            return
        binary, text = self._compiler.binary(kernel.text), self.last_ir(kernel)
        cores = facts(text).vector_cores
        if not cores:
            raise Refused(f"the compiler does not say how many vector cores {self.target} has")
        first = [self._runtime.sync_address()] if _SYNC_ADDRESS in text else []
        self._loaded[kernel.text] = _Loaded(self._runtime.load(binary, kernel.name), cores, first)

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        loaded = self._loaded[kernel.text]
        blocks = min(loaded.cores, rows)
        self._runtime.launch(loaded.function, blocks, packed(kernel, arguments, blocks, loaded.first))


class _Loaded(NamedTuple):
    function: int
    cores: int
    first: list[int]


def packed(kernel: Kernel, arguments: Sequence[int], blocks: int, first: Sequence[int] = ()) -> bytes:
    """A kernel's arguments in memory.

    In order: the address for synchronisation, if it gets one, a lock and a workspace, which it does not use, its
    pointers (8 bytes each), its integers (4 bytes), and the grid.
    """
    count = len(kernel.pointers)
    pointers, integers = [*first, 0, 0, *arguments[:count]], [*arguments[count:], blocks, 1, 1]
    return struct.pack(f"<{len(pointers)}Q{len(integers)}i", *pointers, *integers)


@functools.cache
def current() -> Ascend:
    """This machine.

    Raises:
        Refused: no chip, no compiler or no runtime; says what is missing.
    """
    chip = machine()["chip"]
    if chip == "unknown":
        raise Refused("torch_npu cannot tell the chip")
    compiler = find(chip, f"CANN {machine()['CANN']}")
    compiler.check_last()
    return Ascend(compiler, AclRuntime(), calls_back())


def calls_back() -> bool:
    """Whether this CANN has callbacks of custom operations in Python (`ge.custom_op`, from 9.2 by its tags)."""
    try:
        return importlib.util.find_spec("ge.custom_op") is not None
    except (ImportError, ValueError):
        return False


def machine() -> dict[str, str]:
    """What a proof holds for: names and versions, "unknown" where they cannot be found out."""
    import torch_npu

    def asked(ask: Callable[[], object]) -> str:
        try:
            return str(ask() or "unknown")
        except Exception:  # without a driver there is no device to ask for
            return "unknown"

    return {
        "chip": asked(torch_npu.npu.get_device_name),
        "CANN": asked(torch_npu.npu.utils.get_cann_version),
        "torch_npu": asked(lambda: torch_npu.__version__),
        "npu_fuse_pass": f"{getattr(sys.modules.get('npu_fuse_pass'), '__version__', 'unknown')} {_generator()}",
    }


@functools.cache
def _generator() -> str:
    """A hash of the sources that kernels are made by: another generator is another version."""
    rooms = pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[1] / "emit"
    texts = [path.read_bytes() for room in rooms for path in sorted(room.glob("*.py"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


class AclRuntime:
    """The functions of libascendcl.so, from CANN 8.5 on (`aclrtLaunchKernelWithHostArgs`).

    Raises:
        Refused: the library is missing or older.
    """

    def __init__(self, library: Any = None) -> None:
        try:
            acl = ctypes.CDLL(_LIBRARY) if library is None else library
            self._load, self._function = acl.aclrtBinaryLoadFromData, acl.aclrtBinaryGetFunction
            self._sync, self._launch = acl.aclrtGetHardwareSyncAddr, acl.aclrtLaunchKernelWithHostArgs
        except (OSError, AttributeError) as e:
            raise Refused(f"CANN's runtime cannot load or launch kernels: {e}") from e

    def load(self, binary: bytes, name: str) -> int:
        """A function of a binary; raises `Refused`."""
        options = _LoadOptions(ctypes.pointer(_LoadOption(_MAGIC, (_VECTOR_CORE, 0, 0, 0))), 1)
        handle, function = ctypes.c_void_p(), ctypes.c_void_p()
        size = ctypes.c_size_t(len(binary))
        _check("load", self._load(ctypes.c_char_p(binary), size, ctypes.byref(options), ctypes.byref(handle)))
        _check("find", self._function(handle, ctypes.c_char_p(name.encode()), ctypes.byref(function)))
        return function.value or 0

    def sync_address(self) -> int:
        """Where cores synchronise; raises `Refused`."""
        address = ctypes.c_void_p()
        _check("synchronise", self._sync(ctypes.byref(address)))
        return address.value or 0

    def launch(self, function: int, blocks: int, arguments: bytes) -> None:
        """On the current stream; raises `Refused`."""
        size, stream = ctypes.c_size_t(len(arguments)), ctypes.c_void_p(current_stream())
        given = (ctypes.c_void_p(function), ctypes.c_uint32(blocks), stream, None, ctypes.c_char_p(arguments), size)
        _check("launch", self._launch(*given, None, ctypes.c_size_t(0)))


_stream: contextvars.ContextVar[int | None] = contextvars.ContextVar("stream", default=None)


@contextlib.contextmanager
def on_stream(stream: int) -> Iterator[None]:
    """Launches inside the block go to this stream: that of the callback in which they are made."""
    token = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(token)


def current_stream() -> int:
    """That of `on_stream`, else torch_npu's current one."""
    import torch

    if (given := _stream.get()) is not None:
        return given

    return int(torch.get_device_module("npu").current_stream().npu_stream)


class _LoadOption(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("value", ctypes.c_uint32 * 4))


class _LoadOptions(ctypes.Structure):
    _fields_ = (("options", ctypes.POINTER(_LoadOption)), ("count", ctypes.c_size_t))


def _check(what: str, status: int) -> None:
    if status:
        raise Refused(f"CANN's runtime cannot {what} a kernel: it answers {status}")
