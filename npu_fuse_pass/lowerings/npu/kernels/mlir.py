"""MLIR text of a kernel's body under construction, in the form that bishengir-compile takes for Triton kernels.

Named operations (linalg, hfusion) work on the exact part of a buffer that a chunk fills, so that nothing is computed on
what was never loaded, no tail is filled and a sum needs no mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

CHUNK, ONE, NUMBER = "?", "1", ""
"""How many elements a value has: the chunk's, one in a buffer, or it is a number of the scalar unit."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An SSA value: its name, its element type and how many elements it has (CHUNK, ONE, NUMBER)."""

    name: str
    dtype: str
    size: str

    @property
    def type(self) -> str:
        return self.dtype if self.size == NUMBER else f"tensor<{self.size}x{self.dtype}>"


class Body:
    """Lines of one function, and the values in them.

    Args:
        block: the elements of a buffer; a chunk has at most that many, `%n`.
    """

    def __init__(self, block: int) -> None:
        self.block, self.length = block, "%n"
        self._lines: list[str] = []
        self._depth = 2
        self._serial = 0
        self._indices: dict[int, str] = {}

    def add(self, line: str) -> None:
        self._lines.append("  " * self._depth + line)

    def name(self, line: str) -> str:
        """Adds `%new = line` and gives the name."""
        self._serial += 1
        made = f"%v{self._serial}"
        self.add(f"{made} = {line}")
        return made

    @contextmanager
    def loop(self, head: str) -> Iterator[None]:
        """The lines inside of `head { ... }`."""
        self.add(f"{head} {{")
        self._depth += 1
        yield
        self._depth -= 1
        self.add("}")

    def fold(self, start: Value, count: str, segment: int, step: Callable[[str, Value], Value]) -> Value:
        """`step(at, running)` for every `segment` of `count` elements, `%n` of which are `length` meanwhile."""
        at, running, result = f"%at{self._serial}", f"%run{self._serial}", f"%fold{self._serial}"
        over = f"scf.for {at} = {self.index(0)} to {count} step {self.index(segment)}"
        before = self.length
        with self.loop(f"{result} = {over} iter_args({running} = {start.name}) -> ({start.type})"):
            left = self.name(f"arith.subi {count}, {at} : index")
            self.length = self.name(f"arith.minsi {left}, {self.index(segment)} : index")
            made = step(at, dataclasses.replace(start, name=running))
            self.add(f"scf.yield {made.name} : {made.type}")
        self.length = before
        return dataclasses.replace(start, name=result)

    @property
    def text(self) -> str:
        """All lines, the constants of indices first."""
        constants = [f"    {name} = arith.constant {k} : index" for k, name in self._indices.items()]
        return "\n".join([*constants, *self._lines])

    def index(self, k: int) -> str:
        """An index constant."""
        return self._indices.setdefault(k, f"%c{k}")

    def sum_of(self, *indices: str) -> str:
        """Indices added up."""
        total, *rest = indices
        for x in rest:
            total = self.name(f"arith.addi {total}, {x} : index")
        return total

    def product(self, left: str, right: str) -> str:
        return self.name(f"arith.muli {left}, {right} : index")

    def as_index(self, value: str, dtype: str) -> str:
        return self.name(f"arith.index_cast {value} : {dtype} to index")

    def element(self, source: str, index: str, dtype: str) -> str:
        """One element of a vector in the device's memory, read by the scalar unit."""
        at = self._element(source, index, dtype)
        return self.name(f"memref.load {at}[{self.index(0)}] : memref<1x{dtype}, strided<[1], offset: ?>>")

    def number(self, source: str, index: str) -> Value:
        return Value(self.element(source, index, "f32"), "f32", NUMBER)

    def one(self, source: str, index: str, dtype: str) -> Value:
        """One element in a buffer of its own."""
        at = self._element(source, index, dtype)
        buffer = self.name(f"memref.alloc() : memref<1x{dtype}>")
        self.add(f"memref.copy {at}, {buffer} : memref<1x{dtype}, strided<[1], offset: ?>> to memref<1x{dtype}>")
        return Value(self.name(f"bufferization.to_tensor {buffer} restrict writable : memref<1x{dtype}>"), dtype, ONE)

    def load(self, source: str, offset: str, dtype: str) -> Value:
        """`%n` elements into a buffer of their own; the rest of the buffer stays as it is."""
        window, strided = self._window(source, offset, dtype), f"memref<?x{dtype}, strided<[1], offset: ?>>"
        whole, part = f"memref<{self.block}x{dtype}>", f"memref<?x{dtype}, strided<[1]>>"
        buffer = self.name(f"memref.alloc() : {whole}")
        filled = self.name(f"memref.subview {buffer}[0] [{self.length}] [1] : {whole} to {part}")
        self.add(f"memref.copy {window}, {filled} : {strided} to {part}")
        tensor = self.name(f"bufferization.to_tensor {buffer} restrict writable : {whole}")
        return Value(self._part(tensor, dtype), dtype, CHUNK)

    def store(self, value: Value, target: str, offset: str) -> None:
        """Writes what `load` would read there, or one element."""
        strided = f"memref<{value.size}x{value.dtype}, strided<[1], offset: ?>>"
        if value.size == CHUNK:
            window = self._window(target, offset, value.dtype)
        else:
            window = self._element(target, offset, value.dtype)
        self.add(
            f"bufferization.materialize_in_destination {value.name} in writable {window} "
            f": ({value.type}, {strided}) -> ()"
        )

    def constant(self, value: float, dtype: str = "f32") -> Value:
        return Value(self.name(f"arith.constant {literal(value, dtype)} : {dtype}"), dtype, NUMBER)

    def apply(self, operation: str, given: Sequence[Value], dtype: str, size: str = "") -> Value:
        """A named operation into a new buffer, of that size or that of what is given."""
        size = size or given[0].size
        result = f"tensor<{size}x{dtype}>"
        out = self._empty(dtype, size)
        ins = f"{', '.join(x.name for x in given)} : {', '.join(x.type for x in given)}"
        return Value(self.name(f"{operation} ins({ins}) outs({out} : {result}) -> {result}"), dtype, size)

    def spread(self, value: Value, size: str) -> Value:
        """A number, or the one element of a buffer, as often as `size` says."""
        if value.size == size:
            return value
        return self.apply("linalg.fill", [self.taken(value)], value.dtype, size)

    def taken(self, value: Value) -> Value:
        """The one element of a buffer as a number of the scalar unit."""
        if value.size == NUMBER:
            return value
        return Value(self.name(f"tensor.extract {value.name}[{self.index(0)}] : {value.type}"), value.dtype, NUMBER)

    def reduce(self, operation: str, value: Value, start: float) -> Value:
        """All elements of a chunk as one, with `arith.addf` and the like."""
        zero = self.constant(start, value.dtype)
        empty = self.name(f"tensor.empty() : tensor<{value.dtype}>")
        rank0 = f"tensor<{value.dtype}>"
        begin = self.name(f"linalg.fill ins({zero.name} : {value.dtype}) outs({empty} : {rank0}) -> {rank0}")
        total = self.name(
            f"linalg.reduce {{ {operation} }} ins({value.name} : {value.type}) outs({begin} : {rank0}) dimensions = [0]"
        )
        one = f"tensor<1x{value.dtype}>"
        return Value(
            self.name(f"tensor.expand_shape {total} [] output_shape [1] : {rank0} into {one}"), value.dtype, ONE
        )

    def _element(self, source: str, index: str, dtype: str) -> str:
        return self.name(
            f"memref.reinterpret_cast {source} to offset: [{index}], sizes: [1], strides: [1] "
            f": memref<?x{dtype}> to memref<1x{dtype}, strided<[1], offset: ?>>"
        )

    def _window(self, source: str, offset: str, dtype: str) -> str:
        whole, part = (f"memref<{n}x{dtype}, strided<[1], offset: ?>>" for n in (self.block, CHUNK))
        at = self.name(
            f"memref.reinterpret_cast {source} to offset: [{offset}], sizes: [{self.block}], strides: [1] "
            f": memref<?x{dtype}> to {whole}"
        )
        return self.name(f"memref.subview {at}[0] [{self.length}] [1] : {whole} to {part}")

    def _empty(self, dtype: str, size: str) -> str:
        if size == ONE:
            return self.name(f"tensor.empty() : tensor<1x{dtype}>")
        return self._part(self.name(f"tensor.empty() : tensor<{self.block}x{dtype}>"), dtype)

    def _part(self, tensor: str, dtype: str) -> str:
        whole, part = f"tensor<{self.block}x{dtype}>", f"tensor<?x{dtype}>"
        return self.name(f"tensor.extract_slice {tensor}[0] [{self.length}] [1] : {whole} to {part}")


def literal(value: float, dtype: str) -> str:
    """A number as MLIR writes it."""
    if dtype.startswith("i"):
        return str(int(value))
    if math.isfinite(value):
        return f"{value:.9e}"
    bits = {"f32": ("0x7FC00000", "0x7F800000", "0xFF800000")}[dtype]
    return bits[0] if math.isnan(value) else bits[1] if value > 0 else bits[2]
