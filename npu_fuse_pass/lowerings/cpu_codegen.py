"""C++ for one formula: plain loops that the compiler vectorises, no intrinsics, no headers but the standard ones.

A kernel works in passes over memory. Pass k computes the reductions that need k earlier reductions; the last pass
writes. Before each pass every member's scalars are evaluated in double. Elements are split into chunks of CHUNK, and a
reduction adds LANES partial sums per chunk and then the chunks in order, so that the bits of a result depend neither on
the number of threads nor on what else is in the group.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import torch

from ..expr import DTYPE_NAMES, REDUCTIONS, Expr, postorder
from ..ir import Formula
from .cpu_operations import CPP, CPP_TYPES, STORED

CHUNK = 16384
LANES = 16

PRELUDE = (pathlib.Path(__file__).parent / "cpu_kernel.h").read_text()


@dataclasses.dataclass(frozen=True)
class Source:
    """Generated C++ and what the caller must allocate for it."""

    text: str
    stages: tuple[str, ...]  # exported symbols in the order of their calls: "<name>_contribute", "<name>"
    scratch: int  # doubles per member
    partial: int  # doubles per chunk
    passes: int
    bytes_per_element: int  # read and written over all passes
    contribute_bytes: int  # of these, those of the contributions


def generate(name: str, formula: Formula) -> Source:
    """C++ source of the kernel of one group."""
    stages = []
    if formula.contributions:
        stages.append(_Stage(f"{name}_contribute", formula, (), formula.contributions))
    stages.append(_Stage(name, formula, formula.writes, ()))
    scratch = max(len(s.stored) for s in stages) or 1
    partial = 2 * max(max((len(r) for r in s.reductions), default=0) for s in stages) or 1
    header = "\n".join(f"// {line}" for line in formula.text.splitlines())
    sizes = f"static const int64_t SCRATCH = {scratch}, PARTIAL = {partial};\n"
    text = "\n".join([header, PRELUDE, sizes, *(s.text() for s in stages)])
    traffic = [s.bytes_per_element() for s in stages]
    contribute = traffic[0] if formula.contributions else 0
    return Source(
        text, tuple(s.name for s in stages), scratch, partial, sum(s.passes for s in stages), sum(traffic), contribute
    )


class _Stage:
    """One exported function: scalar sections and passes in turn."""

    def __init__(
        self, name: str, formula: Formula, writes: tuple[tuple[int, Expr], ...], contributions: tuple[Expr, ...]
    ) -> None:
        self.name = name
        self.formula = formula
        self.writes = writes
        self.contributions = contributions
        roots = [e for _, e in writes] + list(contributions)
        self.order = postorder(roots)
        self.var = {id(e): f"v{i}" for i, e in enumerate(self.order)}
        self.slot_rank = {s: i for i, s in enumerate(formula.tensor_slots)}
        self.slot_rank |= {s: i for i, s in enumerate(formula.scalar_slots)}
        self.phase: dict[int, int] = {}
        for e in self.order:
            below = max((self.phase[id(a)] for a in e.args), default=0)
            self.phase[id(e)] = below + 1 if e.op in REDUCTIONS else below
        tensor_writes = any(formula.slots[s].tensor for s, _ in writes)
        last = max((self.phase[id(e)] for e in self.order), default=0)
        self.passes = last + (1 if tensor_writes else 0)
        self.last = last
        self.reductions = [
            [e for e in self.order if e.op in REDUCTIONS and self.phase[id(e)] == k + 1] for k in range(last)
        ]
        self.stored = self._stored()

    def _stored(self) -> dict[int, int]:
        """Scalars that leave their section: read by a pass, by a later section, or made by a reduction."""
        needed: dict[int, int] = {}
        for e in self.order:
            for a in e.args:
                if not a.tensor and (e.tensor or e.op in REDUCTIONS or self.phase[id(e)] != self.phase[id(a)]):
                    needed.setdefault(id(a), len(needed))
            if e.op in REDUCTIONS:
                needed.setdefault(id(e), len(needed))
        for slot, e in self.writes:
            if not e.tensor and (self.formula.slots[slot].tensor or self.phase[id(e)] != self.last):
                needed.setdefault(id(e), len(needed))
        for e in self.contributions:
            needed.setdefault(id(e), len(needed))
        return needed

    def text(self) -> str:
        parts = [self._section(k) for k in range(self.last + 1)]
        parts += [self._pass(k) for k in range(self.passes)]
        parts += [self._combine(k) for k in range(self.last)]
        return "\n".join([*parts, self._driver()])

    def _section(self, k: int) -> str:
        """The scalars of phase k of one member."""
        lines = [f"static inline void {self.name}_scalars{k}(const Args& a, int64_t m, double* s) {{"]
        defined: set[int] = set()
        for e in self.order:
            if e.tensor or self.phase[id(e)] != k or e.op in REDUCTIONS:
                continue
            for a in e.args:
                if id(a) not in defined and (self.phase[id(a)] != k or a.op in REDUCTIONS):
                    lines.append(f"  const {_type(a)} {self.var[id(a)]} = {self._unstore(a)};")
                    defined.add(id(a))
            lines.append(f"  const {_type(e)} {self.var[id(e)]} = {self._value(e)};")
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

    def _work(self, k: int) -> tuple[list[tuple[int, Expr]], list[Expr], list[Expr]]:
        """What pass k writes, what it reduces, and every expression that it needs for that."""
        final = k == self.last
        writes = [(slot, e) for slot, e in self.writes if self.formula.slots[slot].tensor] if final else []
        sums = [] if final else self.reductions[k]
        # a reduction's own result is a scalar that an earlier pass made: stop there
        return writes, sums, _until_scalars([e for _, e in writes] + [e.args[0] for e in sums])

    def bytes_per_element(self) -> int:
        total = 0
        for k in range(self.passes):
            writes, _, needed = self._work(k)
            slots = [e.value for e in needed if e.op == "leaf" and e.tensor] + [slot for slot, _ in writes]
            total += sum(self.formula.slots[s].dtype.itemsize for s in slots)  # type: ignore[index,misc]
        return total

    def _pass(self, k: int) -> str:
        """One sweep over a chunk: the reductions of pass k, or the writes."""
        writes, sums, needed = self._work(k)
        body = [e for e in needed if e.tensor and e.op != "leaf"]
        leaves = [e for e in needed if e.op == "leaf" and e.tensor]
        scalars = [e for e in needed if not e.tensor]
        lines = [
            f"static void {self.name}_pass{k}(const Args& a, int64_t m, int64_t start, int64_t n, "
            "const double* s, double* p) {"
        ]
        slots = sorted({e.value for e in leaves} | {slot for slot, _ in writes})  # type: ignore[type-var]
        for slot in slots:
            lines.append(self._pointer(slot, any(slot == w for w, _ in writes)))  # type: ignore[arg-type]
        lines += [f"  const {_type(e)} {self.var[id(e)]} = {self._unstore(e)};" for e in scalars]
        inner = [f"const {_type(e)} {self.var[id(e)]} = {self._load(e)};" for e in leaves]
        inner += [f"const {_type(e)} {self.var[id(e)]} = {self._value(e)};" for e in body]
        inner += [f"t{slot}[i] = {self._narrow(slot, e)};" for slot, e in writes]
        if not sums:
            lines += ["  for (int64_t i = 0; i < n; ++i) {", *(f"    {x}" for x in inner), "  }"]
        else:
            lines += self._lanes(sums, inner)
        return "\n".join([*lines, "}"])

    def _lanes(self, sums: list[Expr], inner: list[str]) -> list[str]:
        """LANES running values per reduction: element i goes to lane i % LANES whatever the vector width."""
        lines = [f"  double r{j}[{LANES}], e{j}[{LANES}];" for j in range(len(sums))]
        start = [f"r{j}[l] = {_NEUTRAL[e.op]}; e{j}[l] = 0;" for j, e in enumerate(sums)]
        lines.append(f"  for (int l = 0; l < {LANES}; ++l) {{ {' '.join(start)} }}")
        step = [*inner, *(_take(e, f"r{j}[l]", f"e{j}[l]", self.var[id(e.args[0])]) for j, e in enumerate(sums))]
        body = [f"      {x}" for x in ["const int64_t i = base + l;", *step]]
        lines += ["  int64_t base = 0;", f"  for (; base + {LANES} <= n; base += {LANES})"]
        lines += [f"    for (int l = 0; l < {LANES}; ++l) {{", *body, "    }"]
        lines += ["  for (int l = 0; base + l < n; ++l) {", *body, "  }"]
        for j, e in enumerate(sums):
            lines.append(f"  double x{j} = {_NEUTRAL[e.op]}, y{j} = 0;")
            take = _take(e, f"x{j}", f"y{j}", f"r{j}[l]")
            lines.append(f"  for (int l = 0; l < {LANES}; ++l) {{ {take} y{j} += e{j}[l]; }}")
            lines.append(f"  p[{2 * j}] = x{j}; p[{2 * j + 1}] = y{j};")
        return lines

    def _combine(self, k: int) -> str:
        """The reductions of pass k of one member, from its chunks in order."""
        lines = [f"static inline void {self.name}_combine{k}(const Args& a, int64_t m, double* s) {{"]
        for j, e in enumerate(self.reductions[k]):
            take = _take(e, "x", "y", f"a.partial[c * PARTIAL + {2 * j}]")
            lines.append(f"  {{ double x = {_NEUTRAL[e.op]}, y = 0;")
            lines.append("    for (int64_t c = a.first_chunk[m]; c < a.first_chunk[m + 1]; ++c) {")
            lines.append(f"      {take} y += a.partial[c * PARTIAL + {2 * j + 1}];")
            lines.append("    }")
            lines.append(f"    s[{self.stored[id(e)]}] = std::isfinite(x) ? x + y : x; }}")
        return "\n".join([*lines, "}"])

    def _driver(self) -> str:
        n = self.name
        lines = [f'extern "C" void {n}(const Args* args) {{', "  const Args& a = *args;"]
        lines += ["  #pragma omp parallel num_threads(a.threads) if (a.threads > 1)", "  {"]
        for k in range(self.last + 1):
            combine = f"{n}_combine{k - 1}(a, m, s); " if k else ""
            lines += ["    #pragma omp for schedule(static)", "    for (int64_t m = 0; m < a.members; ++m)"]
            lines.append("      if (a.active[m]) {")
            lines.append(f"        double* s = a.scratch + m * SCRATCH; {combine}{n}_scalars{k}(a, m, s);")
            lines.append("      }")
            if k < self.passes:
                lines += [
                    "    #pragma omp for schedule(dynamic, a.grain)",
                    "    for (int64_t c = 0; c < a.chunks; ++c) {",
                ]
                lines.append("      const int64_t m = a.chunk_member[c], start = a.chunk_start[c];")
                lines.append("      if (!a.active[m]) continue;")
                lines.append(f"      const int64_t left = a.numel[m] - start, n = left < {CHUNK} ? left : {CHUNK};")
                lines.append(f"      {n}_pass{k}(a, m, start, n, a.scratch + m * SCRATCH, a.partial + c * PARTIAL);")
                lines.append("    }")
        return "\n".join([*lines, "  }", "}"])

    def _pointer(self, slot: int, written: bool) -> str:
        stored = STORED[DTYPE_NAMES[self.formula.slots[slot].dtype]]
        const = "" if written else "const "
        source = f"a.tensors[{self.slot_rank[slot]} * a.members + m]"
        return f"  {const}{stored}* __restrict__ t{slot} = ({stored}*){source} + start;"

    def _load(self, e: Expr) -> str:
        return f"widen(t{e.value}[i])"

    def _unstore(self, e: Expr) -> str:
        source = f"s[{self.stored[id(e)]}]"
        return f"{source} != 0" if e.dtype == torch.bool else f"({_type(e)}){source}"

    def _value(self, e: Expr) -> str:
        if e.op == "leaf":
            return f"load(a, {self.slot_rank[e.value]}, m)"  # type: ignore[index]
        args = [self.var[id(a)] for a in e.args]
        if e.op == "cast":
            return _cast(e, args[0])
        return CPP[e.op].format(*args)

    def _narrow(self, slot: int, e: Expr) -> str:
        dtype = DTYPE_NAMES[self.formula.slots[slot].dtype]
        value = self.var[id(e)]
        if dtype in ("f16", "bf16"):
            return f"narrow_{STORED[dtype]}({value})"
        return f"({CPP_TYPES[dtype]}){value}"


def _until_scalars(roots: list[Expr]) -> list[Expr]:
    """Expressions below `roots`, arguments first, not looking below scalars."""
    found: dict[int, Expr] = {}

    def visit(e: Expr) -> None:
        if id(e) not in found:
            for a in e.args if e.tensor else ():
                visit(a)
            found[id(e)] = e

    for root in roots:
        visit(root)
    return list(found.values())


_NEUTRAL = {"sum": "0.0", "amax": "-INFINITY", "amin": "INFINITY"}


def _take(e: Expr, running: str, rest: str, value: str) -> str:
    """One more value into a reduction; a sum keeps what rounding loses, so that its bits hardly depend on an order."""
    if e.op == "sum":
        return f"add_exact({running}, {rest}, {value});"
    return f"{running} = {'maximum' if e.op == 'amax' else 'minimum'}({running}, {value});"


@functools.cache
def _cpp_type(name: str) -> str:
    return CPP_TYPES.get(name, "float")  # half-precision values are held widened


def _type(e: Expr) -> str:
    return _cpp_type(DTYPE_NAMES[e.dtype])


def _cast(e: Expr, value: str) -> str:
    """A cast; half precision is held as the float that it rounds to."""
    name = DTYPE_NAMES[e.dtype]
    if name in ("f16", "bf16"):
        return f"widen(narrow_{STORED[name]}((float){value}))"
    return f"({CPP_TYPES[name]}){value}"
