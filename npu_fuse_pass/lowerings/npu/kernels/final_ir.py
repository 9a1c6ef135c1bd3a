"""What the compiler's last IR says about a kernel: what it moves, what it occupies, whether copies overlap work.

The compiler drops double buffering silently where buffers do not fit, so the IR has to be read.
"""

from __future__ import annotations

import dataclasses
import math
import re

SIZES = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "i1": 1}
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d+) : i64")
_POINTER = re.compile(
    r"(%\w+) = hivm\.hir\.pointer_cast\((%\w+)\).*? : memref<([0-9x]+)x(\w+), #hivm\.address_space<ub>>"
)
_COPY = re.compile(
    r"hivm\.hir\.(load|store) ins\((%\w+) : memref<(\S*?)x(\w+),.*?\) outs\((%\w+) : memref<(\S*?)x(\w+),"
)
_SUBVIEW = re.compile(r"(%\w+) = memref\.(?:view|subview|cast|collapse_shape|expand_shape|reinterpret_cast) (%\w+)")
_CHOICE = re.compile(r"(%\w+) = arith\.select %\w+, (%\w+), (%\w+) : memref<")
_MAIN = re.compile(r"^( *)scf\.for %\w+ = %\w+ to %\w+ step %\w+ +: i32 \{\n(.*?)^\1\}", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one trip through a kernel's loop over chunks moves between device memory and the core, and its buffers.

    Attributes:
        loads: element types of what is read for each element of a chunk, without what is one number per chunk.
        stores: of what is written.
        single_buffered: how many of these copies have one buffer only, so that they wait for the work on it.
        buffer_bytes: the highest byte of the core's memory that is in use, of `buffer_limit`.
    """

    loads: tuple[str, ...]
    stores: tuple[str, ...]
    single_buffered: int
    buffer_bytes: int
    buffer_limit: int
    vector_cores: int

    @property
    def bytes_per_element(self) -> int:
        return sum(SIZES[dtype] for dtype in (*self.loads, *self.stores))

    @property
    def double_buffered(self) -> bool:
        return self.single_buffered == 0 and self.buffer_bytes <= self.buffer_limit


def main_loop(text: str) -> str:
    """The lines of the loop over the rows of a kernel's table."""
    found = _MAIN.search(text)
    return found[2] if found else ""


def facts(text: str) -> Facts:
    """Reads the last IR of one kernel."""
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    buffers = {}
    for name, address, shape, dtype in _POINTER.findall(text):
        size = math.prod(int(n) for n in shape.split("x")) * SIZES[dtype]
        buffers[name] = constants.get(address, 0) + size
    below = dict(_SUBVIEW.findall(text))
    two = {name for name, first, second in _CHOICE.findall(text) if first != second}
    loads: list[str] = []
    stores: list[str] = []
    single = 0
    for kind, source, source_shape, source_type, target, target_shape, target_type in _COPY.findall(main_loop(text)):
        shape, dtype, local = (
            (target_shape, target_type, target) if kind == "load" else (source_shape, source_type, source)
        )
        if shape.strip("x") == "1":
            continue
        (loads if kind == "load" else stores).append(dtype)
        while local not in two and local in below:
            local = below[local]
        single += local not in two
    used = max(buffers.values(), default=0)

    def number(name: str) -> int:
        found = re.search(rf'{name}", (\d+)', text)
        return int(found[1]) if found else 0

    return Facts(tuple(loads), tuple(stores), single, used, number("UB_SIZE") // 8, number("VECTOR_CORE_COUNT"))
