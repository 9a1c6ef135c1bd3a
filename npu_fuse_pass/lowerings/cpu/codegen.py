"""C++ for one formula: plain loops that the compiler vectorises, no intrinsics, no headers but the standard ones.

A kernel works in sweeps over memory; `kernels.sweeps` schedules them. Before each sweep every member's scalars are
evaluated in double. Elements are split into chunks of CHUNK, and a reduction adds LANES partial sums per chunk and then
the chunks in order, so that the bits of a result depend neither on the number of threads nor on what else is in the
group.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Sequence, Set

import torch

from npu_fuse_pass.ir.dimensions import EXPAND, OVER, has_dimensions
from npu_fuse_pass.ir.expr import DTYPE_NAMES, REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.cpu import over
from npu_fuse_pass.lowerings.cpu.cpp_ops import CPP, CPP_TYPES, STORED, cast, cpp_type, rounded
from npu_fuse_pass.lowerings.kernels.sweeps import Function, Sweep, kept_scalars, schedule
from npu_fuse_pass.tensors.stochastic import ROW

CHUNK = 16384
HALVES = 512
"""Elements whose float16 tensors are floats at a time, in the nearest cache; a multiple of LANES * BLOCK."""

LANES = 16
BLOCK = 8
"""Values that a lane adds before it keeps track of what rounding loses, which is most of a sum's work. Only where no
tensor is float64: what is made of the sum is then rounded further than those last bits."""

_HERE = pathlib.Path(__file__).parent
PRELUDE = (_HERE / "kernel.h").read_text(encoding="utf-8")
_STOCHASTIC = (_HERE / "stochastic.h").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Source:
    """Generated C++ and what the caller must allocate for it."""

    text: str
    functions: tuple[str, ...]  # exported symbols in the order of their calls: "<name>_contribute", "<name>"
    scratch: int  # doubles per member
    partial: int  # doubles per chunk
    bytes_per_element: int  # read and written over all sweeps
    contribute_bytes: int  # of these, those of the contributions
    pieces: tuple[tuple[str, ...], ...] = ()  # of each function, where pieces are exported in its place
    reduced: tuple[tuple[tuple[tuple[int, str], ...], ...], ...] = ()  # by each piece: where in scratch, and how


def generate(name: str, formula: Formula, totals: Collection[int] | None = (), in_pieces: bool = False) -> Source:
    """C++ source of the kernel of one group; `totals`: see `sweeps.schedule`.

    `in_pieces`: export a function for each section with the sweep behind it, and write nothing before the last one; the
    caller may change what a piece has reduced before the next.
    """
    made = schedule(formula, totals, late=in_pieces)
    names = [f"{name}_contribute", name][-len(made.functions) :]
    var = {id(e): f"v{i}" for i, e in enumerate(postorder(formula.roots))}
    numbers = range(2 - len(names), 2)
    numbered = zip(names, numbers, made.functions, strict=True)
    functions = [_Function(*given, formula, var, in_pieces) for given in numbered]
    scratch = max(len(s.stored) for s in functions) or 1
    partial = 2 * max(max((len(r) for r in s.reductions), default=0) for s in functions) or 1
    header = "\n".join(f"// {line}" for line in formula.text.splitlines())
    sizes = f"static const int64_t SCRATCH = {scratch}, PARTIAL = {partial};\n"
    more = [over.PRELUDE] if has_dimensions(formula.roots) else []
    more += [_STOCHASTIC] if any(e.op == "stochastic" for s in made.functions for e in s.order) else []
    text = "\n".join([header, PRELUDE, *more, sizes, *(s.text() for s in functions)])
    contribute = made.bytes[0] if formula.contributions else 0
    pieces = tuple(tuple(f"{s.name}_{k}" for k in range(s.last + 1)) for s in functions) if in_pieces else ()
    exported = tuple(name for function in pieces for name in function) if in_pieces else tuple(names)
    reduced = tuple(tuple(tuple((s.stored[id(e)], e.op) for e in row) for row in s.reductions) for s in functions)
    return Source(text, exported, scratch, partial, sum(made.bytes), contribute, pieces, reduced)


class _Function:
    """The text of one exported function: scalar sections and sweeps in turn."""

    def __init__(
        self, name: str, number: int, function: Function, formula: Formula, var: dict[int, str], in_pieces: bool
    ) -> None:
        self.name = name
        self.in_pieces = in_pieces
        self.number = number
        self.formula = formula
        self.writes = function.writes
        self.contributions = function.contributions
        self.order = function.order
        self.phase = function.phase
        self.sweeps = function.sweeps
        self.last = function.last
        self.var = var
        self.slot_rank = {s: i for i, s in enumerate(formula.tensor_slots)}
        self.slot_rank |= {s: i for i, s in enumerate(formula.scalar_slots)}
        self.reductions = [p.sums for p in self.sweeps[: self.last]]
        self.stored = {id(e): i for i, e in enumerate(kept_scalars(function, formula))}
        self.wide = any(s.tensor and s.dtype == torch.float64 for s in formula.slots)
        self.rounds = torch.bfloat16 in {s.dtype for s in formula.slots} | {e.dtype for e in self.order}

    def text(self) -> str:
        parts = [self._section(k) for k in range(self.last + 1)]
        parts += [self._sweep(k, p) for k, p in enumerate(self.sweeps)]
        if self.in_pieces:
            return "\n".join([*parts, *(self._piece(k) for k in range(self.last + 1))])
        return "\n".join([*parts, self._driver()])

    def _section(self, k: int) -> str:
        """The scalars of phase k of one member; first the reductions of the sweep before, from its chunks in order."""
        lines = [f"static inline void {self.name}_scalars{k}(const Args& a, int64_t m) {{"]
        lines += ["  double* s = a.scratch + m * SCRATCH;", *(self._combine(k - 1) if k and not self.in_pieces else [])]
        defined: set[int] = set()
        for e in self.order:
            if e.tensor or self.phase[id(e)] != k or e.op in REDUCTIONS:
                continue
            for a in e.args:
                if id(a) not in defined and (self.phase[id(a)] != k or a.op in REDUCTIONS):
                    lines.append(f"  {self._let(a, self._unstore(a))}")
                    defined.add(id(a))
            if _remembered(e):
                lines.append(f"  static thread_local Power p{self.var[id(e)]};")
            lines.append(f"  {self._let(e, self._value(e))}")
            defined.add(id(e))
            if id(e) in self.stored:
                lines.append(f"  s[{self.stored[id(e)]}] = {self.var[id(e)]};")
        if k == self.last:
            for slot, e in self.writes:
                if not self.formula.slots[slot].tensor:
                    value = self.var[id(e)] if id(e) in defined else self._unstore(e)
                    lines.append(f"  store(a, {self.slot_rank[slot]}, m, {value});")
            for i, e in enumerate(self.contributions):
                value = self.var[id(e)] if id(e) in defined else self._unstore(e)
                lines.append(f"  a.contributions[{i} * a.members + m] = {value};")
        return "\n".join([*lines, "}"])

    def _sweep(self, k: int, work: Sweep) -> str:
        """A sweep's work on one chunk."""
        if reduction := _over(work):
            return self._over_sweep(k, work, reduction)
        loads = [e for e in work.values if id(e) in work.places]
        body = [e for e in work.values if e.tensor and id(e) not in work.places and e.op != "leaf"]
        read, written = set(work.places.values()), {slot for slot, _ in work.writes}
        halves = self._halves(read | written)
        step = str(HALVES if halves else CHUNK)
        inner = [self._let(e, self._loaded(work.places[id(e)])) for e in loads]
        used = {id(a) for e in (*work.values, *work.sums) for a in e.args}
        used |= {id(e) for slot, e in work.writes if slot not in halves}
        inner += [self._let(e, self._value(e, rounds=id(e) in used)) for e in body]  # else storing it rounds
        inner += [
            f"w{slot}[i] = (float){self.var[id(e)]};" if slot in halves else f"t{slot}[i] = {self._narrow(slot, e)};"
            for slot, e in work.writes
        ]
        before, loop, after = self._lanes(work.sums, inner) if work.sums else ([], _loop(inner), [])
        lines = [f"static void {self.name}_pass{k}(const Args& a, int64_t m, int64_t c) {{"]
        lines.append("  const int64_t chunk = a.chunk_start[c], left = a.numel[m] - chunk;")
        lines.append(f"  const int64_t end = chunk + (left < {CHUNK} ? left : {CHUNK});")
        lines.append("  const double* s = a.scratch + m * SCRATCH;")
        lines += [f"  {self._let(e, self._unstore(e))}" for e in work.values if not e.tensor]
        lines += [*before, f"  for (int64_t start = chunk; start < end; start += {step}) {{"]
        lines.append(f"  const int64_t n = end - start < {step} ? end - start : {step};")
        lines += [self._pointer(slot, slot in written) for slot in sorted(read | written)]
        lines += [self._noise(e) for e in body if e.op == "stochastic"]
        lines += over.buffers(body, self.formula, self._name, self._address, step)
        lines += self._widened(halves, read, step)
        lines += [*loop, *(f"  cut_all(t{slot}, w{slot}, n);" for slot in sorted(halves & written)), "  }", *after]
        return "\n".join([*lines, "}"])

    def _halves(self, slots: Set[int]) -> set[int]:
        """The slots of float16, whose elements are floats in a buffer while they are worked on."""
        return {slot for slot in slots if self.formula.slots[slot].dtype == torch.float16}

    def _widened(self, halves: Set[int], read: Set[int], size: str) -> list[str]:
        lines = [f"  float w{slot}[{size}];" for slot in sorted(halves)]
        return lines + [f"  widen_all(w{slot}, t{slot}, n);" for slot in sorted(halves & read)]

    def _over_sweep(self, k: int, work: Sweep, reduction: Expr) -> str:
        """One task of a reduction over some of the dimensions."""
        after = over.above(reduction, work.values)
        last = {id(e) for e in after}
        loads = [e for e in work.values if id(e) in work.places]
        body = [
            e for e in work.values if e.tensor and id(e) not in work.places and e.op != "leaf" and id(e) not in last
        ]
        lines = [f"static void {self.name}_pass{k}(const Args& a, int64_t m, int64_t c) {{"]
        lines.append("  const double* s = a.scratch + m * SCRATCH;")
        lines += [f"  {self._let(e, self._unstore(e))}" for e in work.values if not e.tensor]
        lines.append("  const auto values = [&](int64_t start, int64_t n, double* __restrict__ out) {")
        read = set(work.places.values())
        lines += [self._pointer(slot, False) for slot in sorted(read)]
        lines += over.buffers(body, self.formula, self._name, self._address, over.WIDTH)
        lines += self._widened(self._halves(read), read, over.WIDTH)
        inner = [self._let(e, self._loaded(work.places[id(e)])) for e in loads]
        inner += [self._let(e, self._value(e)) for e in body if e is not reduction]
        inner.append(f"out[i] = {self.var[id(reduction.args[0])]};")
        lines += [*_loop(inner), "  };"]
        lines.append(f"  const auto put = [&](int64_t i, double {self.var[id(reduction)]}) {{")
        for slot, _ in work.writes:
            stored = STORED[DTYPE_NAMES[self.formula.slots[slot].dtype]]
            lines.append(f"    {stored}* t{slot} = ({stored}*){self._address(slot)};")
        lines += [f"    {self._let(e, self._value(e))}" for e in after]
        lines += [f"    t{slot}[i] = {self._narrow(slot, e)};" for slot, e in work.writes]
        return "\n".join([*lines, "  };", over.call(reduction, self._name, self.wide), "}"])

    def _name(self, e: Expr) -> str:
        return self.var[id(e)]

    def _lanes(self, sums: Sequence[Expr], inner: list[str]) -> tuple[list[str], list[str], list[str]]:
        """LANES running values per reduction: element i goes to lane i % LANES whatever the vector width.

        Returns what stands before the loops over elements, these, and what makes one value of the lanes.
        """
        before = [f"  double r{j}[{LANES}], e{j}[{LANES}], b{j}[{LANES}];" for j in range(len(sums))]
        start = [f"r{j}[l] = {_NEUTRAL[e.op]}; e{j}[l] = b{j}[l] = 0;" for j, e in enumerate(sums)]
        before.append(f"  for (int l = 0; l < {LANES}; ++l) {{ {' '.join(start)} }}")
        values = [self.var[id(e.args[0])] for e in sums]
        exact = [_take(e, f"r{j}[l]", f"e{j}[l]", values[j]) for j, e in enumerate(sums)]
        blocks = [j for j, e in enumerate(sums) if e.op == "sum" and not self.wide]
        taken = [f"b{j}[l] += {values[j]};" if j in blocks else take for j, take in enumerate(exact)]
        flush = [f"add_exact(r{j}[l], e{j}[l], b{j}[l]); b{j}[l] = 0;" for j in blocks]
        flushed = f"for (int l = 0; l < {LANES}; ++l) {{ {' '.join(flush)} }}"
        body = ["const int64_t i = base + l;", *inner]
        lines = ["  int64_t base = 0;", f"  for (; base + {LANES} <= n; base += {LANES}) {{"]
        lines += [f"    {_NO_OVERLAP}", f"    for (int l = 0; l < {LANES}; ++l) {{"]
        lines += [*(f"      {x}" for x in (*body, *taken)), "    }"]
        if blocks:
            lines += [f"    if (base % {BLOCK * LANES} == {(BLOCK - 1) * LANES}) {flushed}", "  }", f"  {flushed}"]
        else:
            lines.append("  }")
        lines += ["  for (int l = 0; base + l < n; ++l) {", *(f"      {x}" for x in (*body, *exact)), "  }"]
        after = []
        for j, e in enumerate(sums):
            after.append(f"  double x{j} = {_NEUTRAL[e.op]}, y{j} = 0;")
            take = _take(e, f"x{j}", f"y{j}", f"r{j}[l]")
            after.append(f"  for (int l = 0; l < {LANES}; ++l) {{ {take} y{j} += e{j}[l]; }}")
            partial = "a.partial[c * PARTIAL + {}]"
            after.append(f"  {partial.format(2 * j)} = x{j}; {partial.format(2 * j + 1)} = y{j};")
        return before, lines, after

    def _combine(self, k: int) -> list[str]:
        lines = []
        for j, e in enumerate(self.reductions[k]):
            take = _take(e, "x", "y", f"a.partial[c * PARTIAL + {2 * j}]")
            lines.append(f"  {{ double x = {_NEUTRAL[e.op]}, y = 0;")
            lines.append("    for (int64_t c = a.first_chunk[m]; c < a.first_chunk[m + 1]; ++c) {")
            lines.append(f"      {take} y += a.partial[c * PARTIAL + {2 * j + 1}];")
            lines.append("    }")
            lines.append(f"    s[{self.stored[id(e)]}] = math::isfinite(x) ? x + y : x; }}")
        return lines

    def _piece(self, k: int) -> str:
        """The scalars of one phase, the sweep behind them, and what that has reduced."""
        n = self.name
        lines = []
        if k < self.last:
            body = ["  double* s = a.scratch + m * SCRATCH;", *self._combine(k)]
            lines = [f"static inline void {n}_combine{k}(const Args& a, int64_t m) {{", *body, "}"]
        lines += [f'extern "C" void {n}_{k}(const Args* args) {{', "  const Args& a = *args;"]
        lines += [
            "  #pragma omp parallel num_threads(a.threads) if (a.threads > 1)",
            "  {",
            *self._turn(k, "a.active[m]"),
        ]
        if k < self.last:
            lines += ["    #pragma omp for schedule(static)", "    for (int64_t m = 0; m < a.members; ++m)"]
            nothing = " ".join(f"s[{self.stored[id(e)]}] = {_NEUTRAL[e.op]};" for e in self.reductions[k])
            lines.append(f"      if (a.active[m]) {n}_combine{k}(a, m);")
            lines.append(f"      else {{ double* s = a.scratch + m * SCRATCH; {nothing} }}")
        return "\n".join([*lines, "  }", "}"])

    def _turn(self, k: int, which: str) -> list[str]:
        """The scalars of one phase and the sweep behind them, of the members for which `which` holds."""
        lines = ["    #pragma omp for schedule(static)", "    for (int64_t m = 0; m < a.members; ++m)"]
        lines.append(f"      if ({which}) {self.name}_scalars{k}(a, m);")
        if k < len(self.sweeps):
            chunks = ("a.grain", "a.chunks", "a.chunk_member[c]")
            at_once, count, member = ("1", "a.tasks", "a.task[5 * c]") if _over(self.sweeps[k]) else chunks
            lines.append(f"    #pragma omp for schedule(dynamic, {at_once})")
            lines += [f"    for (int64_t c = 0; c < {count}; ++c) {{", f"      const int64_t m = {member};"]
            lines += [f"      if ({which}) {self.name}_pass{k}(a, m, c);", "    }"]
        return lines

    def _driver(self) -> str:
        n, several = self.name, len(self.sweeps) > 1 and not any(map(_over, self.sweeps))
        lines = [f'extern "C" void {n}(const Args* args) {{', "  const Args& a = *args;"]
        if several:
            size = sum(self.formula.slots[slot].dtype.itemsize for slot in self.formula.tensor_slots)
            lines.append(f"  const int64_t small = fits_a_cache(a, {size});")
        lines += ["  #pragma omp parallel num_threads(a.threads) if (a.threads > 1)", "  {"]
        if several:
            lines += self._small_members()
        here = "a.active[m] && a.numel[m] > small" if several else "a.active[m]"
        for k in range(self.last + 1):
            lines += self._turn(k, here)
        return "\n".join([*lines, "  }", f"  a.done[{self.number}] = 1;", "}"])

    def _small_members(self) -> list[str]:
        """All sweeps over a member in turn, while a cache holds it: only the first one reads memory."""
        lines = ["    #pragma omp for schedule(dynamic, a.grain) nowait", "    for (int64_t m = 0; m < a.members; ++m)"]
        lines.append("      if (a.active[m] && a.numel[m] <= small) {")
        for k in range(self.last + 1):
            lines.append(f"        {self.name}_scalars{k}(a, m);")
            if k < len(self.sweeps):
                chunks = "int64_t c = a.first_chunk[m]; c < a.first_chunk[m + 1]; ++c"
                lines.append(f"        for ({chunks}) {self.name}_pass{k}(a, m, c);")
        return [*lines, "      }"]

    def _let(self, e: Expr, value: str) -> str:
        """The statement that defines the variable of an expression."""
        return f"const {cpp_type(e)} {self.var[id(e)]} = {value};"

    def _pointer(self, slot: int, written: bool) -> str:
        stored = STORED[DTYPE_NAMES[self.formula.slots[slot].dtype]]
        const = "" if written else "const "
        return f"  {const}{stored}* __restrict__ t{slot} = ({stored}*){self._address(slot)} + start;"

    def _address(self, slot: int) -> str:
        return f"a.tensors[{self.slot_rank[slot]} * a.members + m]"

    def _loaded(self, slot: int, array: str = "") -> str:
        dtype = self.formula.slots[slot].dtype
        value = f"w{slot}[i]" if dtype == torch.float16 and not array else f"widen({array or f't{slot}'}[i])"
        return f"plain({value})" if self.rounds and dtype not in (torch.bfloat16, torch.bool) else value

    def _unstore(self, e: Expr) -> str:
        source = f"s[{self.stored[id(e)]}]"
        return f"{source} != 0" if e.dtype == torch.bool else f"({cpp_type(e)}){source}"

    def _value(self, e: Expr, rounds: bool = True) -> str:
        if e.op == "leaf":
            return f"load(a, {self.slot_rank[e.value]}, m)"  # type: ignore[index]
        args = [self.var[id(a)] for a in e.args]
        if e.op == "cast":
            return cast(e, args[0]) if rounds or e.dtype != torch.float16 else f"(float){args[0]}"
        if e.op == EXPAND:
            return self._loaded(e.args[0].value, f"b{self.var[id(e)]}")  # type: ignore[arg-type]
        if e.op == "stochastic":
            return f"stochastic_{STORED[DTYPE_NAMES[e.dtype]]}({args[0]}, q{self.var[id(e)]}[i])"
        if e.op == "numel" and self.in_pieces:
            return "double(a.whole[m])"
        if _remembered(e):
            return f"p{self.var[id(e)]}({', '.join(args)})"
        return CPP[e.op].format(*args)

    def _noise(self, e: Expr) -> str:
        """The random bits of a chunk, made where a cache holds them."""
        seed, parameter, first, step = (self.var[id(a)] for a in e.args[2:])
        name = self.var[id(e)]
        made = f"random_bits(b{name}, int64_t({first}) + start, n, {seed}, {parameter}, {step})"
        return f"  uint16_t b{name}[{CHUNK + 2 * ROW}];\n  const uint16_t* __restrict__ q{name} = {made};"

    def _narrow(self, slot: int, e: Expr) -> str:
        dtype = DTYPE_NAMES[self.formula.slots[slot].dtype]
        value = self.var[id(e)]
        if dtype == "bf16" and DTYPE_NAMES[e.dtype] != dtype:
            value = rounded(dtype, value)
        return f"cut_{STORED[dtype]}((float){value})" if dtype in ("f16", "bf16") else f"({CPP_TYPES[dtype]}){value}"


# Tensors are known not to overlap. g++ would check it again, pair by pair, at each call, and computes element after
# element where there are more than ten pairs; it does not take __restrict__ of local variables for it.
_NO_OVERLAP = "#pragma GCC ivdep"
_NEUTRAL = {"sum": "0.0", "amax": "-INFINITY", "amin": "INFINITY"}


def _over(work: Sweep) -> Expr | None:
    """The reduction over some of the dimensions in a sweep, if it has one."""
    return next((e for e in work.values if e.op in OVER), None)


def _remembered(e: Expr) -> bool:
    return e.op == "pow" and not e.tensor and e.dtype == torch.float64


def _loop(inner: Sequence[str]) -> list[str]:
    return [f"  {_NO_OVERLAP}", "  for (int64_t i = 0; i < n; ++i) {", *(f"    {x}" for x in inner), "  }"]


def _take(e: Expr, running: str, rest: str, value: str) -> str:
    """Add a value to a reduction; a sum keeps what rounding loses, so that its bits hardly depend on the order."""
    if e.op == "sum":
        return f"add_exact({running}, {rest}, {value});"
    return f"{running} = {'maximum' if e.op == 'amax' else 'minimum'}({running}, {value});"
