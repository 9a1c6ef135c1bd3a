"""What runs generated kernels: one small interface; `ascend.current` is the one that there is.

Behind it is everything that needs CANN: compiling to a binary, loading it, launching it on the current stream. It was
never launched on an NPU. Tests put a stand-in in its place, which executes the compiler's last IR on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel


class Hardware(Protocol):
    """One kind of machine.

    Attributes:
        target: the chip that is compiled for.
        identity: everything on which binaries depend beside their source; "": nothing is compiled.
        chunk: the elements of a chunk; None: as many as the compiler has room for.
        calls_back: whether GE calls what runs a node of generated kernels; if not, a step launches them without GE.
    """

    target: str
    identity: str
    chunk: int | None
    calls_back: bool

    def last_ir(self, kernel: Kernel) -> str:
        """The compiler's last IR of a kernel.

        Raises:
            Refused: the compiler does not take it.
        """
        ...

    def load(self, kernel: Kernel) -> None:
        """Make a kernel ready to be launched: compile it, load it on the device.

        Raises:
            Refused: one of these fails; nothing was launched.
        """
        ...

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        """Launch a kernel that was loaded, on the current stream.

        Args:
            arguments: addresses and integers, in the order of `kernel.pointers` and `kernel.integers`.
            rows: of its table; more blocks than that have nothing to do.

        Raises:
            Refused: the launch fails.
        """
        ...
