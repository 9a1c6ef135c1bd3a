"""Stage 3: find the kernel that computes a group's formula, and its scalars. `solve` has the method."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.fused_op import parsed
from npu_fuse_pass.ir.types import Formula, Group, Leaf
from npu_fuse_pass.match.algebra import Algebra
from npu_fuse_pass.match.known_kernels import KERNELS, KnownKernel
from npu_fuse_pass.match.result import Match, NoMatch
from npu_fuse_pass.match.solve import Attempt, DiffersError
from npu_fuse_pass.match.verify import Relation, relations

log = logging.getLogger(__name__)

_LONGEST = 150  # expressions; a formula of more is no kernel's


def match(groups: Sequence[Group], leaves: Sequence[Leaf]) -> list[Match | NoMatch]:
    """For every group the first of `KERNELS` that computes it, or why none does. Never raises."""
    return [match_group(group, leaves) for group in groups]


def match_group(group: Group, leaves: Sequence[Leaf]) -> Match | NoMatch:
    """`match_formula` with the constants of a group's members, and with the names of its slots."""
    kinds = {s: {leaves[member[s]].kind for member in group.members} for s in group.formula.scalar_slots}
    slots = [s for s, found in kinds.items() if found == {"constant"}]
    rows = dict.fromkeys(tuple(member[s] for s in slots) for member in group.members)
    constants = [{s: leaves[i].value for s, i in zip(slots, row, strict=True)} for row in rows]
    result = match_formula(group.formula, constants)
    totals = {s for s, found in kinds.items() if "total" in found}
    if isinstance(result, NoMatch):
        return dataclasses.replace(result, reason=_named(result.reason, group.labels))
    if any(e.op == "leaf" and e.value in totals for e in postorder([*result.scalars.values()])):
        return NoMatch(f"{result.kernel.name}: a scalar would be computed from tensors")
    return dataclasses.replace(result, assumptions=tuple(_named(a, group.labels) for a in result.assumptions))


def _named(text: str, labels: Sequence[str]) -> str:
    """A text with the names of slots; unknowns of the algebra, whose numbers come after theirs, are x31 and so on."""
    named = dict(enumerate(labels))
    return re.sub(r"\$(\d+)", lambda found: named.get(int(found[1]), f"x{found[1]}"), text)


def match_formula(formula: Formula, constants: Sequence[Mapping[int, float]] = ()) -> Match | NoMatch:
    """The first kernel that computes a formula. Decisions are cached by structure.

    Args:
        formula: of a group.
        constants: the values of scalar slots that never change, one mapping for every member (or distinct one).
    """
    return _decide(formula.text, relations(constants))


@functools.lru_cache(maxsize=256)
def _decide(text: str, known: tuple[tuple[int, Relation], ...]) -> Match | NoMatch:
    try:
        return _compare(text, known)
    except Exception as e:  # sympy is missing or fails: the group is fused all the same, and training must go on
        log.warning("matching failed, which costs a dedicated operation and nothing else", exc_info=True)
        return NoMatch(f"matching failed: {type(e).__name__}: {e}")


def _compare(text: str, known: tuple[tuple[int, Relation], ...]) -> Match | NoMatch:
    formula = parsed(text)
    targets = {slot: e for slot, e in formula.writes if formula.slots[slot].tensor}
    if not targets:
        return NoMatch("it writes 0-dim tensors only")
    length = sum(1 for _ in postorder([*targets.values()]))
    if length > _LONGEST:
        return NoMatch(f"the formula is {length} operations long; no kernel is")
    candidates = [(k, roles) for k in KERNELS for roles in _roles(k, targets)]
    if not candidates:
        return NoMatch(f"no kernel writes {len(targets)} tensors that depend on each other in this way")
    try:
        names = dict.fromkeys(n for k, _ in candidates for n in (*k.scalars, *k.prepared))
        algebra = Algebra(formula, dict(known), tuple(names))
    except Unsupported as e:
        return NoMatch(str(e.reason))
    nearest, agreed = NoMatch(""), -1
    for kernel, roles in candidates:
        for sign in (1, -1):
            attempt = Attempt(algebra, kernel, roles, dict(known), sign)
            try:
                return attempt.match()
            except DiffersError as e:
                reason = str(e)
            except Unsupported as e:
                reason = e.reason.text
            if len(attempt.agreed) > agreed:
                nearest, agreed = NoMatch(f"{kernel.name}: {reason}"), len(attempt.agreed)
            if not attempt.signed:
                break
    return nearest


def _roles(kernel: KnownKernel, targets: Mapping[int, Expr]) -> Iterator[dict[str, int]]:
    """Possible assignments of outputs to written slots: an average depends on itself and, by the gradient, on var."""
    if len(targets) != len(kernel.outputs):
        return
    read = {
        s: [t for t in targets if any(e.op == "leaf" and e.value == t for e in postorder([root]))]
        for s, root in targets.items()
    }
    for slots in itertools.permutations(targets):
        roles = dict(zip(kernel.outputs, slots, strict=True))
        name_of = {slot: name for name, slot in roles.items()}
        if all({name_of[s] for s in read[slot]} <= _reads(kernel)[name] for name, slot in roles.items()):
            yield roles


@functools.cache
def _reads(kernel: KnownKernel) -> dict[str, set[str]]:
    """For every output of a kernel the old tensors that it may depend on."""
    results = kernel.function(*(_Trace({n}) for n in kernel.inputs), **{n: _Trace(set()) for n in kernel.scalars})
    return {name: {*x.names, kernel.outputs[0]} for name, x in zip(kernel.outputs, results, strict=True)}


class _Trace:
    """A value as the set of names of the tensors in it."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def join(self, *others: Any) -> _Trace:
        return _Trace(self.names.union(*(o.names for o in others if isinstance(o, _Trace))))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = sqrt = maximum = join
