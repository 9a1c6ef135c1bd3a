"""One kernel against one formula: solves for the kernel's scalars and its gradient.

The kernel's function is run on symbols, output after output, the parameter last, and compared with what the formula
writes. The difference of the two is a polynomial in the update's tensors; each of its coefficients is an equation for
the kernel's scalars. The gradient is an unknown as well, solved for with the first average. Equations are solved one
unknown at a time. A kernel matches if all hold, if its scalars are valid (defined for every value of the formula's
scalars, not negative, without bias corrections of their own), and if random numbers agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npu_fuse_pass.ir.expr import Expr
from npu_fuse_pass.match.algebra import Algebra, Value
from npu_fuse_pass.match.known_kernels import KnownKernel
from npu_fuse_pass.match.polynomial import coefficients, generators_of
from npu_fuse_pass.match.result import Match
from npu_fuse_pass.match.verify import Relation, disagreement
from npu_fuse_pass.match.write import Writer
from npu_fuse_pass.tolerances import MATCHED


class DiffersError(Exception):
    """The kernel does not compute the formula; the message says why."""


class Attempt:
    """One kernel, with every output assigned to a slot that the formula writes.

    `agreed` are the outputs found equal so far. `signed`: the gradient is known by its square; `sign` chooses its sign.
    """

    def __init__(
        self, algebra: Algebra, kernel: KnownKernel, roles: Mapping[str, int], known: Mapping[int, Relation], sign: int
    ) -> None:
        self.agreed: list[str] = []
        self.signed = False
        self._algebra, self._kernel, self._roles, self._known, self._sign = algebra, kernel, roles, known, sign
        writes = dict(algebra.formula.writes)
        self._targets = {name: algebra.values[id(writes[slot])] for name, slot in roles.items()}
        self._var, *states = [roles[name] for name in kernel.outputs]
        self._states = set(states)
        self._values = {n: algebra.slots[s] for n, s in roles.items() if n not in kernel.prepared}
        self._powers: dict[str, int | None] = {}  # power scalar -> w; None where the base is zero
        self._unknown = {name: algebra.unknown[name] for name in (*kernel.scalars, *kernel.prepared)}

    def match(self) -> Match:
        """Solve for all unknowns and check the result.

        Raises:
            DiffersError: the kernel does not compute the formula.
            Unsupported: it does, with scalars that cannot be written down.
        """
        algebra, kernel = self._algebra, self._kernel
        first, *rest = kernel.outputs
        for name in [*rest, first]:
            if name == first:
                self._find_powers()
            self._agree(name)
            self.agreed.append(name)
        writer = Writer(algebra)
        scalars = {name: self._scalar(name, writer) for name in kernel.scalars}
        inputs = {name: self._tensor(name, writer) for name in kernel.inputs}
        dtypes = [slot.dtype for slot in algebra.formula.slots if slot.tensor]
        assumed = [f"where(${i} == 0, a, b) is b" for i in dict.fromkeys(algebra.guards)]
        assumed += ["0 <= beta < 1, t > 0"] if self._powers else []
        used = set().union(*(self._values[name].generators() for name in kernel.scalars))
        assumed += ["what stands under roots is not negative"] if used & algebra.inside.keys() else []
        tolerance = max(MATCHED[d] for d in dtypes if d in MATCHED)
        found = Match(kernel, self._roles, inputs, scalars, writer.slots, writer.constants, tuple(assumed), tolerance)
        wrong = disagreement(algebra.formula, found, self._known, algebra.compared)
        if wrong:
            raise DiffersError(wrong)
        return found

    # Equations --------------------------------------------------------------------------------------------------------

    def _agree(self, name: str) -> None:
        """Make an output equal, solving for the unknowns in it."""
        while True:
            given = {n: self._values.get(n) or self._algebra.generator(i) for n, i in self._unknown.items()}
            result = self._algebra.run(self._kernel, {**self._values, **given}, name)
            equations = self._inside_roots(name, result) or self._equations(result - self._targets[name])
            if not self._solve(equations):
                break
        if any(equations):
            self._differs(name)

    def _differs(self, name: str) -> None:
        agreed = f"{', '.join(self.agreed)} as in the kernel, but " if self.agreed else ""
        raise DiffersError(f"{agreed}{name} is different")

    def _inside_roots(self, name: str, result: Value) -> list[Any]:
        """Equations for unknowns under a root: they make it the root that the formula has."""
        inside = self._algebra.inside
        for i in sorted(result.generators() & inside.keys()):
            if self._open(inside[i].n):
                wanted = sorted(self._targets[name].tensors() & inside.keys())
                if not wanted:
                    self._differs(name)
                return self._equations(inside[i] - inside[wanted[0]])
        return []

    def _open(self, polynomial: Any) -> list[str]:
        found = generators_of(polynomial)
        return [n for n, i in self._unknown.items() if n not in self._values and i in found]

    def _equations(self, difference: Value) -> list[Any]:
        """The coefficients of a difference as a polynomial in the tensors that no unknown depends on."""
        tensors, open_ = difference.tensors(), self._open(difference.n)
        if "grad" in open_:
            tensors = {t for t in tensors if self._algebra.reads[t] & self._states}
        elif self._kernel.outputs[0] in open_:
            tensors -= {self._var}
        return coefficients(difference.n, tensors)

    def _solve(self, equations: list[Any]) -> bool:
        """Solve equations with one unknown, in turn. Returns True if any was solved."""
        any_solved = False
        while True:
            ready = [(e, self._open(e)) for e in equations]
            name = next((n[0] for e, n in ready if len(n) == 1 and self._solve_one(e, n[0])), None)
            if name is None:
                return any_solved
            any_solved = True
            equations = [self._values[name].insert(e, self._unknown[name]) for e in equations]

    def _solve_one(self, equation: Any, name: str) -> bool:
        by_power = self._algebra.by_power(equation, self._unknown[name])
        value: Value | None = None
        if by_power.keys() <= {0, 1}:
            value = (-by_power.get(0, self._algebra.number(0)) / by_power[1]).cancelled()
        elif name == "grad" and by_power.keys() <= {0, 2}:
            value = (-by_power.get(0, self._algebra.number(0)) / by_power[2]).root_of_square()
            self.signed = True
            value = value if value is None or self._sign > 0 else -value
        if value is None or not self._algebra.in_formula(value):
            return False
        if name in self._kernel.scalars and value.tensors():
            raise DiffersError(f"{name} would not be a number")
        self._values[name] = value
        return True

    def _find_powers(self) -> None:
        """Find the formula's bias corrections: powers beta^t of the solved beta."""
        for name, (base, shift) in self._kernel.powers.items():
            beta = self._values.get(base)
            if beta is None:
                raise DiffersError(f"{base} is undetermined")
            roots = [w for w, (x, _, _, _) in self._algebra.powers.items() if x.equals(beta)]
            if not beta.n:
                self._powers[name], self._values[name] = None, self._algebra.number(0)
            elif len(roots) != 1:
                found = f"{len(roots)} different powers" if roots else "no power"
                raise DiffersError(f"no bias correction: {found} of {base} = {self._algebra.show(beta)}")
            else:
                self._powers[name] = roots[0]
                self._values[name] = (1 - self._algebra.generator(roots[0]) ** 2) * beta**shift

    # Results ----------------------------------------------------------------------------------------------------------

    def _scalar(self, name: str, writer: Writer) -> Expr:
        root = self._powers.get(name)
        if root is not None:
            return writer.power(root, self._kernel.powers[name][1])
        nothing = self._algebra.number(name == "epsilon")  # where no output depends on it; under a root rather not zero
        value = self._values.setdefault(name, nothing)
        if name not in self._kernel.scaled and value.generators() & set(self._powers.values()):
            raise DiffersError(f"{name} would carry a bias correction: {self._algebra.show(value)}")
        self._check_defined(name, value)
        if self._algebra.reduced & value.generators():
            raise DiffersError(f"{name} would be computed from tensors")
        return writer.write(value)

    def _check_defined(self, name: str, value: Value) -> None:
        targets = [] if name in self._kernel.scalars else self._targets.values()
        if not self._algebra.is_defined(value, targets):
            raise DiffersError(f"{name} would be {self._algebra.show(value)}, which is not defined everywhere")

    def _tensor(self, name: str, writer: Writer) -> Expr:
        value = self._values.get(name)
        if value is None:
            raise DiffersError(f"{name} is undetermined")
        is_var = name == self._kernel.outputs[0] and name in self._kernel.prepared
        if is_var and (value / self._algebra.slots[self._var]).cancelled().tensors():
            raise DiffersError(f"{name} would be changed before the update by more than a factor")
        self._check_defined(name, value)
        return writer.tensor(value)
