"""A preview of generated kernels: what they are and what they move, without an NPU and without CANN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.lowerings.npu.kernels.compiler import PREVIEW_TARGET, Compiler, Refused, find
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel
from npu_fuse_pass.lowerings.npu.kernels.groups import generate_groups
from npu_fuse_pass.lowerings.npu.kernels.hardware import Hardware
from npu_fuse_pass.lowerings.npu.kernels.launch import Generated

_UNKNOWN = 2048


class PreviewHardware:
    """Hardware that compiles as far as there is a compiler, and launches nothing."""

    calls_back = True

    def __init__(self) -> None:
        self.target, self._compiler = PREVIEW_TARGET, _compiler()
        self.identity = self._compiler.identity if self._compiler is not None else ""
        self.chunk = None if self._compiler is not None else _UNKNOWN

    def last_ir(self, kernel: Kernel) -> str:
        if self._compiler is None:
            raise Refused("there is no compiler")
        return self._compiler.last_ir(kernel.text)

    def load(self, kernel: Kernel) -> None:
        """Nothing."""

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        raise Refused("kernels of a preview are not launched")


def _compiler() -> Compiler | None:
    try:
        return find(PREVIEW_TARGET)
    except Refused:
        return None


def preview(leaves: Sequence[Leaf], groups: Sequence[Group]) -> Mapping[str, Generated | str]:
    """Kernels of a step's groups, by their names; or why a group has none."""
    return generate_groups(leaves, groups, PreviewHardware())


def text(found: Mapping[str, Generated | str], hardware: Hardware | None = None) -> str:
    """Sources and last IR of kernels, as a dump shows them."""
    return "\n".join(line for name, made in found.items() for line in _lines(name, made, hardware or PreviewHardware()))


def _lines(name: str, made: Generated | str, hardware: Hardware) -> Iterator[str]:
    if isinstance(made, str):
        yield f"// {name}: GE operations{f': {made}' if made else ''}\n"
        return
    launches = made.kernels.launches
    yield f"// {name}: {len(launches)} launches, {made.kernels.bytes_per_element} bytes per element; {made.note}"
    for k, kernel in enumerate(launches, 1):
        moved = f"{kernel.bytes_per_element} bytes per element" if kernel.over == "chunks" else "a few numbers"
        yield f"\n// {kernel.name}: launch {k} of {len(launches)}, a row for each of the {kernel.over}, {moved}"
        yield kernel.text.rstrip()
        try:
            ir = hardware.last_ir(kernel)
        except Refused as e:
            yield f"\n// {kernel.name}: no last IR: {e}"
        else:
            yield f"\n// {kernel.name}: the compiler's last IR for {hardware.target}\n{ir.rstrip()}"
    yield ""
