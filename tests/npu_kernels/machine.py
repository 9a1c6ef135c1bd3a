"""Runs the compiler's last IR on this CPU: every line becomes a line of Python, vector operations become numpy's.

The core's memory is one array of bytes, in which the compiler's own planned addresses are used; masks are bits in it,
and what a temporary buffer holds is lost, so a wrong plan of memory gives wrong numbers. Device memory is this
process's, by absolute addresses. The grid is a loop: one block runs after another.

Flags and barriers do nothing here unless a `Watcher` looks (races.py). Not shown: the hardware's rounding of division,
roots and transcendental functions, the order in which it adds, anything parallel. A line that is not known is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Memory = tuple[str, int, int]
"""Where a buffer lies: "ub" or "gm", address in bytes, elements."""

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "uint16", "i64": "int64", "i32": "int32", "i16": "int16"}
DTYPES |= {"i8": "int8", "i1": "bool"}
SIZES = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1}
PIPES = {"load": "PIPE_MTE2", "store": "PIPE_MTE3"}
_UB_BYTES = 256 * 1024


class Watcher(Protocol):
    """What looks at a run: operations of a pipe with the bytes that they touch, flags, barriers."""

    def operation(self, pipe: str, line: str, accesses: Sequence[tuple[bool, str, int, int]]) -> None: ...
    def set_flag(self, source: str, target: str, event: int) -> None: ...
    def wait_flag(self, source: str, target: str, event: int) -> None: ...
    def barrier(self, pipe: str) -> None: ...


class Core:
    """One core's memory, and what the lines of a kernel call."""

    def __init__(self, watcher: Watcher | None) -> None:
        self.memory = np.full(_UB_BYTES, 0x7F, np.uint8)  # as float32 a visible number
        self.watcher = watcher

    def bytes(self, at: Memory, size: int) -> np.ndarray:
        space, address, count = at
        if space == "ub":
            assert address >= 0 and address + count * size <= _UB_BYTES, at
            return self.memory[address : address + count * size]
        return np.asarray(_Device(address, count * size))

    def get(self, at: Memory, dtype: str) -> np.ndarray:
        if dtype == "i1":
            packed = self.bytes((at[0], at[1], -(-at[2] // 8)), 1)
            return np.unpackbits(packed, count=at[2], bitorder="little").view(np.bool_)
        return self.bytes(at, SIZES[dtype]).view(DTYPES[dtype])

    def put(self, at: Memory, dtype: str, value: Any) -> None:
        if dtype == "i1":
            bits = np.broadcast_to(np.asarray(value, np.bool_), (at[2],))
            self.bytes((at[0], at[1], -(-at[2] // 8)), 1)[:] = np.packbits(bits, bitorder="little")
        elif at[2]:
            self.get(at, dtype)[:] = value

    def spoil(self, at: Memory, dtype: str) -> None:
        """A temporary buffer after an operation: nobody may rely on what it held."""
        self.bytes(at, SIZES[dtype])[:] = 0x7F

    def see(self, pipe: str, line: str, *accesses: tuple[bool, Memory, str]) -> None:
        assert self.watcher is not None
        touched = [
            (writes, at[0], at[1], -(-at[2] // 8) if dtype == "i1" else at[2] * SIZES[dtype])
            for writes, at, dtype in accesses
        ]
        self.watcher.operation(pipe, line, touched)


class _Device:
    """Device memory at an absolute address, for numpy."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {
            "data": (address if size else 1, False), "shape": (size,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def _bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _wide(x: np.ndarray, dtype: str) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else x.astype(np.float32)


def _half_away(x: np.ndarray) -> np.ndarray:
    whole = np.trunc(x)
    return whole + np.copysign(np.abs(x - whole) >= 0.5, x)


_ROUNDS = {"round": _half_away, "rint": np.rint, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc}
_ROUNDS |= {"truncwithoverflow": np.trunc}  # to 8 bits, of what fits
_FLOATS = ("f32", "f16", "bf16")


def cast(x: np.ndarray, source: str, target: str, mode: str) -> np.ndarray:
    """vcast: a mode matters between floats and integers, and from float32 to itself."""
    if target == "i1":
        return x != 0
    value = _wide(x, source) if source in _FLOATS else x.astype(np.float32)
    if source == target == "f32" or target.startswith("i"):
        value = _ROUNDS[mode](value)
    if target in ("f16", "bf16") and mode != "rint":
        raise NotImplementedError(f"vcast to {target} with {mode}")
    return _bf16(value) if target == "bf16" else value.astype(DTYPES[target])


def _rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float32 or float16 that rounds once; NumPy's own last bits depend on the CPU."""
    return lambda x: function(np.asarray(x, np.float64)).astype(x.dtype)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float32])(x)


_BINARY: dict[str, Callable[..., Any]] = {
    "vadd": np.add, "vsub": np.subtract, "vmul": np.multiply, "vdiv": np.divide, "vmax": np.maximum,
    "vmin": np.minimum, "vand": np.bitwise_and, "vor": np.bitwise_or, "vxor": np.bitwise_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[..., Any]] = {
    "vsqrt": np.sqrt, "vexp": _rounded(np.exp), "vln": _rounded(np.log), "vabs": np.abs, "vrec": np.reciprocal,
    "vtanh": _rounded(np.tanh), "verf": _erf, "vsin": _rounded(np.sin), "vcos": _rounded(np.cos), "vnot": np.invert,
     "vrsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_REDUCE: dict[str, Callable[..., Any]] = {"sum": np.add.reduce, "max": np.maximum.reduce, "min": np.minimum.reduce}
_SCALAR = {"addi": "+", "subi": "-", "muli": "*", "xori": "^", "andi": "&", "ori": "|", "divsi": "//", "remsi": "%"}
_SCALAR_FLOAT: dict[str, Callable[..., Any]] = {
    "addf": np.add, "subf": np.subtract, "mulf": np.multiply, "divf": np.divide, "maximumf": np.maximum,
    "minimumf": np.minimum, "maxnumf": np.fmax, "minnumf": np.fmin, "negf": np.negative, "sqrt": np.sqrt,
    "exp": _rounded(np.exp), "log": _rounded(np.log), "absf": np.abs,
}  # fmt: skip
_PREDICATES = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
_FLOAT_PREDICATES = {"oeq": "eq", "une": "ne", "olt": "lt", "ole": "le", "ogt": "gt", "oge": "ge"}

_TYPE = re.compile(r"memref<(?:[^<>]|<[^<>]*>)*>|\w+")
_VECTOR = re.compile(r"hivm\.hir\.(\w+)(?: <(\w+)>)? ins\((.*?) : (.*?)\) outs\((.*?) : (.*?)\)(.*)$")
_TEMPORARY = re.compile(r"temp_buffer\((%[\w#]+) : (memref<.*?>>)\)")
_FLAG = re.compile(r"hivm\.hir\.(set_flag|wait_flag)\[<(\w+)>, <(\w+)>, (?:<EVENT_ID(\d+)>|(%[\w#]+))\]")
_LOOP = re.compile(
    r"(?:(%\w+)(?::(\d+))? = )?scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)\s*"
    r"(?:iter_args\((.*?)\))?"
)
_BARRIER = re.compile(r"hivm\.hir\.pipe_barrier\[<(\w+)>\]")
_MAP = re.compile(r"(#map\d*) = affine_map<\((.*?)\)(?:\[(.*?)\])? -> \((.*)\)>$")
_SKIPPED = ("annotation.mark", "hivm.hir.set_mask_norm", "hivm.hir.set_ctrl", "return", "module", "#")


def element(memref: str) -> str:
    """The element type of a memref type."""
    found = re.match(r"memref<(?:[\d?]+x)*(\w+)", memref)
    assert found, memref
    return found[1]


class Kernel:
    """A kernel's last IR as a function.

    Args:
        text: the module.
        watcher: sees every operation, flag and barrier, and makes the run slower.
    """

    def __init__(self, text: str, watcher: Watcher | None = None) -> None:
        self._watcher = watcher
        self.source, self.name, self.memories = _Translation(text, watcher is not None).result()
        space: dict[str, Any] = {"np": np, "cast": cast, **_MODULE}
        exec(compile(self.source, self.name, "exec"), space)
        self._run = space["kernel"]

    def __call__(self, blocks: int, *arguments: int) -> None:
        """Runs all blocks, one after the other.

        Args:
            arguments: addresses and integers in the order of the kernel's own arguments, without the hidden ones
                (before: ffts, lock, workspace; after: the grid).
        """
        given = [0, 0, 0, *arguments, blocks, 1, 1]
        assert len(given) == len(self.memories), (len(given), self.memories)
        values = [("gm", x, 0) if memory else x for x, memory in zip(given, self.memories, strict=True)]
        with np.errstate(all="ignore"):
            for block in range(blocks):
                self._run(Core(self._watcher), block, *values)


_MODULE = {
    "BINARY": _BINARY, "UNARY": _UNARY, "COMPARE": _COMPARE, "REDUCE": _REDUCE, "FLOAT": _SCALAR_FLOAT,
}  # fmt: skip


def _variable(name: str) -> str:
    return "v_" + name.removeprefix("%").replace("#", "_")


class _Translation:
    """The entry function's lines, one after the other."""

    def __init__(self, text: str, watched: bool) -> None:
        self._watched = watched
        self._maps = {m[1]: m.groups()[1:] for line in text.splitlines() if (m := _MAP.match(line))}
        functions = re.findall(r"  func\.func @.*?\n  \}", text, re.DOTALL)
        self._head, self._body = next(f for f in functions if "hacc.entry" in f.split("\n", 1)[0]).split("\n", 1)
        self._lines: list[str] = []
        self._depth = 1
        self._loops: list[list[tuple[str, str]]] = [[]]  # of each open block: results and the running values for them

    def result(self) -> tuple[str, str, list[bool]]:
        """Python source, the kernel's name, which arguments are memory."""
        name = re.search(r"@(\w+)\(", self._head)
        assert name
        inner = self._head[self._head.index("(") + 1 : self._head.rindex(") attributes")]
        arguments = re.findall(r"(%\w+): (memref|\w+)", re.sub(r"\{[^{}]*\}", "", inner))
        names = ", ".join(_variable(n) for n, _ in arguments)
        for line in self._body.splitlines():
            self._line(line.strip())
        source = "\n".join([f"def kernel(core, block, {names}):", *self._lines, ""])
        return source, name[1], [kind == "memref" for _, kind in arguments]

    def _add(self, line: str) -> None:
        self._lines.append("    " * self._depth + line)

    def _line(self, line: str) -> None:
        if not line or line.startswith(_SKIPPED):
            return
        if line.startswith("}"):
            self._depth -= 1
            for target, running in self._loops.pop():
                self._add(f"{target} = {running}")
            return
        if line.startswith("scf.yield"):
            given = re.findall(r"%[\w#]+", line.split(":")[0])
            if given:
                running = ", ".join(name for _, name in self._loops[-1])
                self._add(f"{running} = {', '.join(map(_variable, given))}")
            else:
                self._add("pass")
            return
        if flag := _FLAG.search(line):
            if self._watched:
                kind, source, target, fixed, dynamic = flag.groups()
                event = fixed or _variable(dynamic)
                self._add(f"core.watcher.{kind}({source!r}, {target!r}, {event})")
            return
        if barrier := _BARRIER.search(line):
            if self._watched:
                self._add(f"core.watcher.barrier({barrier[1]!r})")
            return
        if vector := _VECTOR.match(line):
            self._vector(line, vector)
            return
        head, _, rest = line.partition(" = ")
        if "scf.for" in line:
            self._loop(line)
        elif line.startswith("memref.store"):
            self._scalar_store(line)
        elif line.startswith("scf.if"):
            self._condition(line)
        elif line.startswith("} else {"):
            raise NotImplementedError(line)
        else:
            self._value(_variable(head.strip()), rest.strip(), line)

    def _loop(self, line: str) -> None:
        m = _LOOP.match(line)
        assert m, line
        result, count, index, low, high, step, carried = m.groups()
        pairs = re.findall(r"(%\w+) = (%[\w#]+)", carried or "")
        names = [_variable(a) for a, _ in pairs]
        for a, b in pairs:
            self._add(f"{_variable(a)} = {_variable(b)}")
        self._add(f"for {_variable(index)} in range({', '.join(map(_variable, (low, high, step)))}):")
        self._depth += 1
        targets = [f"{_variable(result)}_{k}" for k in range(int(count))] if count else [_variable(result or "")]
        self._loops.append(list(zip(targets, names, strict=True)) if names else [])
        self._add("pass")

    def _condition(self, line: str) -> None:
        m = re.match(r"scf\.if (%[\w#]+) \{", line)
        if m is None:
            raise NotImplementedError(line)
        self._add(f"if {_variable(m[1])}:")
        self._depth += 1
        self._loops.append([])
        self._add("pass")

    def _vector(self, line: str, m: re.Match[str]) -> None:
        name, kind, ins, in_types, outs, out_types, rest = m.groups()
        given = list(zip((x.strip() for x in ins.split(",")), _TYPE.findall(_plain(in_types)), strict=True))
        ((out, out_type),) = zip((x.strip() for x in outs.split(",")), _TYPE.findall(_plain(out_types)), strict=True)
        temporary = _TEMPORARY.search(rest)
        operands = [f"core.get({_variable(v)}, {element(t)!r})" if t[0] == "m" else _variable(v) for v, t in given]
        dtype = element(out_type)
        value = self._computed(name, kind, operands, given, dtype, rest, line)
        if self._watched:
            accesses = [f"(False, {_variable(v)}, {element(t)!r})" for v, t in given if t[0] == "m"]
            accesses.append(f"(True, {_variable(out)}, {dtype!r})")
            if temporary:
                accesses.append(f"(True, {_variable(temporary[1])}, {element(temporary[2])!r})")
            self._add(f"core.see({PIPES.get(name, 'PIPE_V')!r}, {line[:100]!r}, {', '.join(accesses)})")
        self._add(f"core.put({_variable(out)}, {dtype!r}, {value})")
        if temporary:
            self._add(f"core.spoil({_variable(temporary[1])}, {element(temporary[2])!r})")

    def _computed(
        self, name: str, kind: str | None, operands: list[str], given: Any, dtype: str, rest: str, line: str
    ) -> str:
        if name in ("load", "store", "copy", "vbrc"):
            return operands[0]
        if name in _BINARY:
            return f"BINARY[{name!r}]({', '.join(operands)})"
        if name in _UNARY:
            return f"UNARY[{name!r}]({operands[0]})"
        if name == "vcmp":
            mode = re.search(r"compare_mode = <(\w+)>", rest)
            return f"COMPARE[{(mode[1] if mode else 'eq')!r}]({', '.join(operands)})"
        if name == "vsel":
            return f"np.where({', '.join(operands)})"
        if name == "vcast":
            mode = re.search(r"round_mode = <(\w+)>", rest)
            return f"cast({operands[0]}, {element(given[0][1])!r}, {dtype!r}, {(mode[1] if mode else 'rint')!r})"
        if name == "vreduce":
            return f"REDUCE[{kind!r}]({operands[0]})"
        raise NotImplementedError(line)

    def _scalar_store(self, line: str) -> None:
        m = re.match(r"memref\.store (%[\w#]+), (%[\w#]+)\[.*?\].* : (memref<.*>)$", line)
        assert m, line
        value, target, dtype = _variable(m[1]), _variable(m[2]), element(m[3])
        if self._watched:
            self._add(f"core.see('PIPE_S', {line[:100]!r}, (True, {target}, {dtype!r}))")
        self._add(f"core.put({target}, {dtype!r}, {value})")

    def _value(self, name: str, rest: str, line: str) -> None:
        operation, _, given = rest.partition(" ")
        operands = re.findall(r"%[\w#]+", given.split(" : ")[0])
        a = [_variable(x) for x in operands]
        short = operation.split(".")[-1]
        if operation == "arith.constant":
            self._add(f"{name} = {_constant(rest)}")
        elif operation == "memref.load":
            dtype = element(line[line.rindex(" : memref<") + 3 :])
            if self._watched:
                self._add(f"core.see('PIPE_S', {line[:100]!r}, (False, {a[0]}, {dtype!r}))")
            value = f"core.get(({a[0]}[0], {a[0]}[1], 1), {dtype!r})[0]"
            self._add(f"{name} = int({value})" if dtype.startswith("i") else f"{name} = {value}")
        elif operation in ("memref.subview", "memref.view", "memref.reinterpret_cast"):
            self._part(name, operation, rest, a)
        elif operation in ("memref.expand_shape", "memref.collapse_shape", "memref.cast"):
            self._add(f"{name} = {a[0]}")
        elif rest.startswith("hivm.hir.pointer_cast"):
            address = re.search(r"\((%[\w#]+)\)", rest)
            assert address
            self._add(f"{name} = ('ub', {_variable(address[1])}, {_elements(rest)})")
        elif rest.startswith("hivm.hir.get_block_idx"):
            self._add(f"{name} = block")
        elif operation.startswith("affine."):
            self._affine(name, operation, given)
        elif operation == "arith.select":
            self._add(f"{name} = {a[1]} if {a[0]} else {a[2]}")
        elif operation == "arith.cmpi":
            self._add(f"{name} = {a[0]} {_PREDICATES[given.split(',')[0]]} {a[1]}")
        elif operation == "arith.cmpf":
            self._add(f"{name} = COMPARE[{_FLOAT_PREDICATES[given.split(',')[0]]!r}]({a[0]}, {a[1]})")
        elif operation in ("arith.index_cast", "arith.trunci", "arith.extui", "arith.extsi"):
            self._add(f"{name} = int({a[0]}){' & 1' if rest.endswith('to i1') else ''}")
        elif operation == "arith.truncf":
            self._add(f"{name} = cast(np.asarray({a[0]}), 'f32', {rest.split()[-1]!r}, 'rint')[()]")
        elif operation == "arith.uitofp":
            self._add(f"{name} = np.float32({a[0]})")
        elif operation.startswith("arith.") and short in _SCALAR:
            self._add(f"{name} = {a[0]} {_SCALAR[short]} {a[1]}")
        elif operation in ("arith.minsi", "arith.maxsi"):
            self._add(f"{name} = {short[:3]}({a[0]}, {a[1]})")
        elif operation.startswith(("arith.", "math.")) and short in _SCALAR_FLOAT:
            self._add(f"{name} = FLOAT[{short!r}]({', '.join(a)})")
        else:
            raise NotImplementedError(line)

    def _part(self, name: str, operation: str, rest: str, a: list[str]) -> None:
        """A part of a buffer, from an offset."""
        size = SIZES[element(rest.split(" to ")[-1])] if element(rest.split(" to ")[-1]) != "i1" else 1
        lists = re.findall(r"\[([^\[\]]*)\]", rest.split(" : memref<")[0])
        source = a[0]
        if operation == "memref.view":  # [shift in bytes][size]
            count = _number(lists[1]) if lists[1] else str(_elements(rest.split(" to ")[-1]))
            self._add(f"{name} = ({source}[0], {source}[1] + {_number(lists[0])}, {count})")
            return
        shift, count = _number(lists[0]), _number(lists[1])
        self._add(f"{name} = ({source}[0], {source}[1] + {shift} * {size}, {count})")

    def _affine(self, name: str, operation: str, given: str) -> None:
        m = re.match(r"(#map\d*)\((.*?)\)(?:\[(.*?)\])?", given)
        assert m, given
        dims, symbols, results = self._maps[m[1]]
        names = [x.strip() for x in f"{dims},{symbols or ''}".split(",") if x.strip()]
        values = [_variable(x.strip()) for x in f"{m[2]},{m[3] or ''}".split(",") if x.strip()]
        text = results.replace("floordiv", "//").replace("mod", "%")
        if "ceildiv" in text:
            raise NotImplementedError(results)
        for n, v in zip(names, values, strict=True):
            text = re.sub(rf"\b{n}\b", v, text)
        function = {"affine.apply": "", "affine.min": "min", "affine.max": "max"}[operation]
        self._add(f"{name} = {function}({text})" if "," in text or not function else f"{name} = {text}")


def _plain(types: str) -> str:
    return re.sub(r", #hivm\.address_space<\w+>", "", types)


def _number(text: str) -> str:
    return _variable(text.strip()) if text.strip().startswith("%") else text.strip()


def _elements(text: str) -> int:
    found = re.search(r"memref<((?:\d+x)+)\w+", text)
    return math.prod(int(n) for n in found[1].split("x")[:-1]) if found else 1


def _constant(rest: str) -> str:
    value, _, dtype = rest.removeprefix("arith.constant ").partition(" : ")
    if value in ("true", "false"):
        return value.capitalize()
    if dtype.startswith("f"):
        if value.startswith("0x"):
            return f"np.uint32({value}).view(np.float32)"
        return f"np.float32({value})"
    return value
