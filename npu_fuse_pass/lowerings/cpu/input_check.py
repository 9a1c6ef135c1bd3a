"""The native input check: one call for all tensors of a step instead of several Python calls for each.

`input_check.cpp` is compiled beside the first kernel with many tensors (four seconds, once for each version of torch)
and kept with the kernels. A step of very many tensors waits for it before its first run; others begin without it. Until
it is there, and where it cannot be had, Python checks.
"""

from __future__ import annotations

import array
import atexit
import collections
import contextlib
import ctypes
import functools
import logging
import operator
import os
import pathlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import PlatformError, Unsupported
from npu_fuse_pass.lowerings.cpu import build as cpu_build
from npu_fuse_pass.lowerings.cpu.compiler import end_all, ending
from npu_fuse_pass.lowerings.cpu.threads import threads
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.reasons import Code

WORTH = 16
"""Tensors below which Python is as fast."""
WAITED = 1000
"""Tensors from which on the first step waits for the library: Python takes a millisecond for them at every step."""
PATIENCE = 5.0
"""Seconds, from the beginning of its compile, for which steps wait."""
_MADE_AT_MOST = 8  # tables for tensors that keep changing
_OWN = 2  # what the library says of the objects that it has learned

_HANDLES = "torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors"

_log = logging.getLogger(__name__)


class NativeInputs:
    """A native table of the kinds of tensors, and of the objects whose gradients may be other objects at every step.

    Attributes:
        addresses: of all, from the last check that found them the same.
        held: ids of those that are not gradients of others.
        own: the tensors that were asked about last are those learned, object by object, gradients of others excepted.
    """

    def __init__(self, tensors: Sequence[Tensor], library: Any) -> None:
        self._library = library
        self.own = True
        owners = array.array("q", _owners(tensors))
        self.held = {id(t) for t, owner in zip(tensors, owners, strict=True) if owner < 0}
        self.addresses = array.array("q", [0]) * len(tensors)
        objects = array.array("q", map(id, tensors))
        handles = find(_HANDLES)(list(tensors))
        pointers = array.array("q", [_pointer(h, None) for h in handles])
        size = Tensor.__base__.__basicsize__  # type: ignore[union-attr]
        table = library.inputs_make(_at(pointers), _at(objects), _at(owners), len(tensors), size)
        if not table:
            raise Unsupported("input check", "a tensor is not contiguous memory of its own kind", Code.CHANGED)
        self._table = table
        weakref.finalize(self, library.inputs_free, table).atexit = False

    def same(self, given: list[Tensor] | None, dicts: NativeDicts | None = None) -> bool:
        """True if tensors are of the same kinds and contiguous in their memory; the caller calls `done` next.

        Args:
            given: those of this step; None: those known and their present gradients. The caller keeps them alive.
            dicts: some that have to hold what they held, too.
        """
        listed, watched = None if given is None else id(given), None if dicts is None else dicts.table
        found = self._library.inputs_same(self._table, listed, _at(self.addresses), threads(), watched)
        self.own = found == _OWN
        return bool(found)

    def write(self, written: array.array[int]) -> None:
        """Tell autograd which of the tensors that `same` found are written (1 or 0 for each)."""
        self._library.inputs_write(self._table, _at(written), threads())

    def done(self) -> None:
        """Let go of the tensors."""
        self._library.inputs_done(self._table)


class NativeDicts:
    """A native table of dicts, with the objects that they hold, in this order.

    Attributes:
        table: its address.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        self._held = [*dicts, *(x for d in dicts for item in d.items() for x in item)]
        self._dicts = array.array("q", map(id, dicts))
        self._sizes = array.array("q", map(len, dicts))
        self._items = array.array("q", map(id, self._held[len(dicts) :]))
        self._versions = array.array("Q", [0]) * len(dicts)
        versions = _at(self._versions) if _have_versions() else 0
        self._table = array.array("q", [_at(self._dicts), _at(self._sizes), len(dicts), _at(self._items), versions])
        self.table = _at(self._table)


@functools.cache
def _have_versions() -> bool:
    """True if the fourth word of a dict is another one after each change, as in Python up to 3.13 (PEP 509).

    Then a dict that is as it was takes one word to read, which is in one cache line in the place of four.
    """
    changes: list[Callable[[dict[Any, Any]], object]] = [
        lambda d: d.update(a=1),
        lambda d: d.update(a=2),
        lambda d: d.setdefault("b", 1),
        lambda d: operator.setitem(d, "b", 2),
        lambda d: d.pop("b"),
        lambda d: operator.delitem(d, "a"),
        lambda d: d.update({"a": 1, "b": 2}),
        lambda d: d.popitem(),
        lambda d: d.clear(),
    ]
    changing: dict[Any, Any] = {}
    version = ctypes.c_uint64.from_address(id(changing) + 3 * ctypes.sizeof(ctypes.c_void_p))
    seen = [version.value]
    for change in changes:
        change(changing)
        seen.append(version.value)
    return len(set(seen)) == len(seen)


class KernelInputs:
    """The input check of one kernel: its table is made as soon as possible, and again for tensors of other kinds.

    Args:
        written: for each tensor, 1 if the kernel writes it, else 0.
    """

    def __init__(self, written: array.array[int]) -> None:
        self._written = written
        self._native: NativeInputs | None = None
        self._left = _MADE_AT_MOST if len(written) >= WORTH else 0
        self._found = False
        if self._left:
            _start()

    def wait(self) -> None:
        """Wait for the library if there are very many tensors."""
        if self._left and len(self._written) >= WAITED:
            wait(PATIENCE)

    @property
    def missing(self) -> str | None:
        """Why there is no table although there should be one."""
        return _library.get("missing") if self._left else None

    def same(self, given: list[Tensor] | None = None, dicts: NativeDicts | None = None) -> array.array[int] | None:
        """The addresses of the tensors if they match the table, else None; see `NativeInputs.same`."""
        self._found = self._native is not None and self._native.same(given, dicts)
        return self._native.addresses if self._native is not None and self._found else None

    def learn(self, tensors: Sequence[Tensor]) -> None:
        """Remember the kinds of tensors other than the table's; the caller has found that the kernel runs on them."""
        known = self._native is not None and self._native.own
        if self._left and not known and (library := _library.get("native")) is not None:
            self._left -= 1
            with contextlib.suppress(Unsupported):
                self._native, self._found = NativeInputs(tensors, library), False

    def forget(self) -> None:
        """Forget the kinds of the tensors: they are of others now, and may be of these again."""
        self._native, self._found = None, False

    def holds(self, ids: Set[int]) -> bool:
        """True if the tensors of this step are those of a table, and those that are not gradients are among these."""
        return self._native is not None and self._native.own and self._native.held <= ids

    def write(self) -> bool:
        """Tell autograd what the kernel writes; False if the last `same` did not find the tensors."""
        if self._native is not None and self._found:
            self._native.write(self._written)
        return self._found

    def release(self) -> None:
        """Let go of the tensors."""
        if self._native is not None and self._found:
            self._native.done()
            self._found = False


def _owners(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the index of the one whose gradient it is; -1: it is checked as itself."""
    leaves = [(i, t) for i, t in enumerate(tensors) if type(t) in (Tensor, torch.nn.Parameter) and t.is_leaf]
    grads = [(id(t.grad), i) for i, t in leaves if t.grad is not None]
    times = collections.Counter(grad for grad, _ in grads)
    owner = {grad: i for grad, i in grads if times[grad] == 1}  # at the next step each may have one of its own
    found = [owner.get(id(t), -1) for t in tensors]
    return [i if i < 0 or found[i] < 0 else -1 for i in found]  # nor a gradient of a gradient


_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "inputs_make": ([_POINTER] * 3 + [_INTEGER] * 2, _POINTER),
    "inputs_free": ([_POINTER], None),
    "inputs_same": ([*[_POINTER] * 3, _INTEGER, _POINTER], ctypes.c_int),
    "inputs_write": ([_POINTER, _POINTER, _INTEGER], None),
    "inputs_done": ([_POINTER], None),
}
_library: dict[str, Any] = {}  # "native", when it is there, or "missing": why it never will be
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _at(numbers: array.array[int]) -> int:
    return numbers.buffer_info()[0]


_threads: list[threading.Thread] = []  # the one that compiles or loads the library
_begun: list[float] = []  # when it did
_lock = threading.Lock()


def _start() -> threading.Thread:
    """Compile or load the library beside everything else; at its end the interpreter kills the compiler."""
    with _lock:
        if not _threads:
            thread = threading.Thread(target=_load, name=cpu_build.BESIDE, daemon=True)
            _threads.append(thread)
            _begun.append(time.monotonic())
            try:
                thread.start()
            except RuntimeError as e:  # a limit on threads
                _miss(e)
        return _threads[0]


@atexit.register
def _end() -> None:
    end_all()
    for thread in _threads:
        if thread.is_alive():
            thread.join(timeout=10)  # it removes its files


def wait(patience: float | None = None) -> bool:
    """Wait until the library is there or cannot be had, or for so many seconds since its compile began.

    Returns:
        Whether it is there.
    """
    thread = _start()
    if thread.is_alive():
        thread.join(None if patience is None else max(0.0, _begun[0] + patience - time.monotonic()))
    return "native" in _library


def forget() -> None:
    """As in a new process: the library is loaded or compiled anew."""
    _library.clear()
    _threads.clear()
    _begun.clear()


def _load() -> None:
    try:
        if find(_HANDLES) is None:
            raise PlatformError(f"torch {torch.__version__} lacks {_HANDLES}")
        built = cpu_build.load(_source(), list(_FUNCTIONS), _torch_flags())
        library = ctypes.PyDLL("npu_fuse_input_check", handle=built._handle)  # keeps the lock
    except Exception as e:
        if not ending():  # else no step will miss it
            _miss(e)
        return
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    _library["native"] = library


def _miss(why: Exception) -> None:
    _library["missing"] = f"tensors are looked at in Python, about 1 us for each parameter and step: {why}"
    _log.warning("%s", _library["missing"])


def _source() -> str:
    text = pathlib.Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    return f"// torch {torch.__version__}\n{text}"  # another torch has other headers


def _torch_flags() -> tuple[str, ...]:
    base = os.path.dirname(torch.__file__)
    abi = int(torch.compiled_with_cxx11_abi())
    libraries = os.path.join(base, "lib")
    return (
        *("-std=c++20", "-O1", f"-I{os.path.join(base, 'include')}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-L{libraries}", "-lc10"),
    )
