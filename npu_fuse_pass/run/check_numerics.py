"""`check_numerics`: the fused step and the original one, side by side on the tensors of a real step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from npu_fuse_pass.errors import NumericsError
from npu_fuse_pass.ir.types import Group, Grouped, Leaf
from npu_fuse_pass.lowerings import eager
from npu_fuse_pass.lowerings.segmented import Generators
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules.core_op import Stepping
from npu_fuse_pass.tolerances import CHECKED_GRAPH, CHECKED_RULE

# An element is measured against its old and new value, and at least against this share of the tensor's largest.
_FLOOR = 1e-3


Values = list[Tensor | None]
T = TypeVar("T", bound=Sequence[Any] | None)


@dataclasses.dataclass(frozen=True)
class _Write:
    """One tensor that a step writes: which leaf, in which slot of which member."""

    leaf: int
    group: Group
    member: int
    slot: int


class SideBySide:
    """Runs both forms of a step. What the step writes holds the original's values afterwards, whatever was found.

    The fused ones stay where the original is known to differ from eager, and does.
    """

    def __init__(
        self, grouped: Grouped, report: CompileReport, rounds_once: bool = False, put_right: bool = False
    ) -> None:
        """Plan the comparison.

        Args:
            rounds_once: the original computes in float32 and rounds what it stores, as rules do.
            put_right: the original is known to differ from eager, see `ir.expr.Builder`: formulas decide with it.
        """
        self._formulas = eager.Program(grouped.leaves, grouped.groups) if put_right and not grouped.segments else None
        self._leaves = grouped.leaves
        self._rounds_once = rounds_once
        self._allowed = CHECKED_RULE if rounds_once else CHECKED_GRAPH
        self._report = report
        self._stores = grouped.stores
        calls = [call for segment in grouped.segments for call in segment.calls]
        self._generators = Generators(calls, {leaf.device for leaf in grouped.leaves if leaf.shape})
        self._writes = [
            _Write(member[slot], group, m, slot)
            for group in grouped.groups
            for m, member in enumerate(group.members)
            for slot in group.formula.written
        ]
        for w in self._writes:
            name = str(self._leaves[w.leaf].dtype).removeprefix("torch.")
            report.check_tolerance[name] = max(report.check_tolerance.get(name, 0.0), self._tolerance(w))

    @torch.no_grad()
    def __call__(
        self,
        values: Values,
        fused: Callable[[], None],
        original: Callable[[], T],
        optimizers: Iterable[Stepping],
        widened: Callable[[], object] | None = None,
    ) -> T:
        """One step. Both forms draw the same random numbers.

        Args:
            values: of all leaves; those of "output" leaves are filled in, with the original's.
            fused: runs the program on `values`.
            original: runs the original step and gives what its graph returns.
            optimizers: whose parameters can be named.
            widened: the original with more exact counters, which decides where `original` differs.

        Returns:
            What the original does.

        Raises:
            NumericsError: a written tensor differs by more than its dtype's tolerance.
            Mismatch, GraphRefused: as the program; nothing was changed.
        """
        leaves = [*(w.leaf for w in self._writes), *(leaf for leaf, _ in self._stores)]
        written = {i: t for i in leaves if (t := _value(values, i)) is not None}
        before = {i: t.detach().clone() for i, t in written.items()}
        restore_generators = self._generators.save()
        fused()
        got = {i: t.detach().clone() for i in leaves if (t := _value(values, i)) is not None}
        _put(written, before)
        restore_generators()
        returned = original()
        self._take_outputs(values, returned)
        self._report.checked_steps += 1
        writes = [w for w in self._writes if w.leaf in got]
        found = [(w, e) for w in writes if (e := self._error(w, got, before, values))]
        stored = [i for i, _ in self._stores if self._differs(i, got, before, values).any()]

        def by_another(form: Callable[[list[Tensor | None]], object]) -> list[Tensor | None]:
            _put(written, before)
            restore_generators()
            exact = [*values]
            form(exact)
            return exact

        if found or stored:
            originals = {i: t.detach().clone() for i, t in written.items()}
            if widened is not None:
                exact = by_another(lambda exact: self._take_outputs(exact, widened()))
                found = [(w, e) for w, e in found if self._error(w, got, before, exact)]
                stored = [i for i in stored if self._differs(i, got, before, exact).any()]
            if found and self._formulas is not None:
                exact = by_another(self._formulas)
                right = {w.leaf: got[w.leaf] for w, _ in found if not self._error(w, got, before, exact)}
                originals |= right
                found = [(w, e) for w, e in found if w.leaf not in right]
            _put(written, originals)
        if found:
            raise self._difference(found, values, optimizers)
        if stored:
            raise self._difference_of_store(stored[0], int(self._differs(stored[0], got, before, values).sum()))
        return returned

    def _take_outputs(self, values: Values, returned: Any) -> None:
        """Fill in the values of "output" leaves with what a graph has returned."""
        for i, leaf in enumerate(self._leaves):
            if leaf.kind == "output" and returned is not None and isinstance(returned[leaf.index], Tensor):
                values[i] = returned[leaf.index]

    def _differs(self, leaf: int, got: Mapping[int, Tensor], before: Mapping[int, Tensor], values: Values) -> Tensor:
        """Which elements differ in a tensor that no kernel writes; complex ones may come from what kernels round."""
        want = values[leaf]
        assert want is not None
        if want.is_complex():
            return _errors(got[leaf], want, before.get(leaf)) > self._allowed.get(want.dtype.to_real(), 0.0)
        return (got[leaf] != want) & ((got[leaf] == got[leaf]) | (want == want))

    def _difference_of_store(self, leaf: int, differing: int) -> NumericsError:
        name, step = self._leaves[leaf].name, self._report.checked_steps
        place = f"{name!r} {tuple(self._leaves[leaf].shape)}"
        text = (
            f"step {step} of this compile: {differing} elements of {place}, of {self._leaves[leaf].dtype}, "
            "differ from the original's. The tensors hold the original's values. No kernel writes such a tensor: "
            "an operation that stays as it is does, or reads what a kernel has made wrongly (docs/numerics.md). "
            'options={"platform": "eager"} trains without fusion'
        )
        return NumericsError(text, "", place, name, float("inf"), step)

    def _error(self, write: _Write, got: Mapping[int, Tensor], before: Mapping[int, Tensor], values: Values) -> float:
        """The largest relative error of a written tensor; 0 within the tolerance."""
        want = values[write.leaf]
        assert want is not None
        made = got[write.leaf]
        if self._rounds_once:  # the original may be torch's class
            made, want = one_not_finite(made), one_not_finite(want.detach())
        error = relative_error(made, want, before.get(write.leaf))
        return error if error > self._tolerance(write) else 0.0

    def _tolerance(self, write: _Write) -> float:
        """That of the written dtype, or of 0-dim tensors that are read: step counters in float32, for example.

        The original computes with those in their own dtype, the fused step in float64.
        """
        leaves = [self._leaves[i] for i in write.group.members[write.member]]
        read = [self._allowed.get(leaf.dtype, 0.0) for leaf in leaves if not leaf.shape]
        return max([self._allowed.get(self._leaves[write.leaf].dtype, 0.0), *read])

    def _difference(
        self, found: Sequence[tuple[_Write, float]], values: Values, optimizers: Iterable[Stepping]
    ) -> NumericsError:
        write, error = found[0]
        tensor, count = write.group.labels[write.slot], len({(id(w.group), w.member) for w, _ in found})
        parameter = self._parameter(write, values, names_of(optimizers))
        dtype = self._leaves[write.leaf].dtype
        more = f"; {count} updates differ in all" if count > 1 else ""
        text = (
            f"step {self._report.checked_steps} of this compile: the fused {tensor!r} of {parameter} in group "
            f"{write.group.name} differs from the original's by {error:.3g} relative (allowed for {dtype} here: "
            f"{self._tolerance(write):g}){more}. The tensors hold the original's values. The group's formula and "
            "kernel are in print(npu_fuse_pass.reports()[-1]). Which stage is at fault: with "
            'options={"dump": FOLDER}, 03_fused_graph.py there finds a difference where capture or grouping is wrong, '
            "and none where the kernel is (docs/numerics.md). "
            'options={"platform": "eager"} trains without fusion'
        )
        return NumericsError(text, write.group.name, parameter, tensor, error, self._report.checked_steps)

    def _parameter(self, write: _Write, values: Values, names: Mapping[int, str]) -> str:
        member = write.group.members[write.member]
        tensors = [i for s, i in enumerate(member) if write.group.formula.slots[s].tensor]
        known = [names[id(values[i])] for i in tensors if i < len(values) and id(values[i]) in names]
        known += [name for i in tensors if (name := _place(self._leaves[i]))]
        shape = tuple(self._leaves[tensors[0]].shape) if tensors else ()
        return f"{known[0] if known else f'update {write.member}'} {shape}"


class Widened(fx.Interpreter):
    """Runs a captured graph with its 0-dim tensors, step counters above all, in float64, as a fused step reads them.

    In the graph itself they are float32, in which 1 - 0.999 has an error of 1.3e-5.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        """Run it on these arguments; what it writes is rounded in the end."""
        returned = super().run(*args)
        for given, wide in self._made.values():
            given.detach().copy_(wide)
        return returned

    def placeholder(self, *args: Any) -> Any:
        return self._wide(super().placeholder(*args))

    def get_attr(self, *args: Any) -> Any:
        return self._wide(super().get_attr(*args))

    def _wide(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape or not value.is_floating_point():
            return value
        return self._made.setdefault(id(value), (value, value.detach().double()))[1]


def _put(tensors: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
    for i, t in tensors.items():
        t.detach().copy_(values[i])


def one_not_finite(t: Tensor) -> Tensor:
    """What is not finite as one value: of two infinities torch's lerp makes a NaN, rules add them (docs/limits.md)."""
    return torch.where(t.isfinite(), t, float("nan")) if t.is_floating_point() or t.is_complex() else t


def relative_error(got: Tensor, want: Tensor, old: Tensor | None) -> float:
    """The largest |got - want| relative to the element's old and new values; inf where only one is not a number."""
    return float(_errors(got, want, old).max()) if want.numel() else 0.0


def _errors(got: Tensor, want: Tensor, old: Tensor | None) -> Tensor:
    """`relative_error` of each element; complex ones as two."""
    if want.is_complex():
        got, want = torch.view_as_real(got.detach()), torch.view_as_real(want.detach())
        old = None if old is None else torch.view_as_real(old)
    a, b = got.double(), want.detach().double()
    scale = b.abs() if old is None else torch.maximum(b.abs(), old.double().abs())
    finite = scale[scale.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    # below the least normal number, units in the last place are all of one size; truth values differ by 1
    least = torch.finfo(got.dtype).smallest_normal if got.dtype.is_floating_point else 1.0
    error = torch.where(same, 0.0, (a - b).abs() / scale.clamp(min=max(_FLOOR * largest, least)))
    return error.nan_to_num(nan=float("inf"), posinf=float("inf"))


def _value(values: Values, leaf: int) -> Tensor | None:
    return values[leaf] if leaf < len(values) else None


def names_of(optimizers: Iterable[Stepping | torch.optim.Optimizer]) -> dict[int, str]:
    """The names of parameters, by identity: those that the optimizer was given, or their places in it."""
    found = {}
    for opt in optimizers:
        for g, group in enumerate(opt.param_groups):
            named = group.get("param_names")
            for k, p in enumerate(group["params"]):
                found[id(p)] = f"{named[k]!r}" if named else f"param_groups[{g}]['params'][{k}]"
    return found


def _place(leaf: Leaf) -> str | None:
    """Where a parameter is in torch's own optimizers, read from the name that Dynamo gives it."""
    found = re.fullmatch(r"\w*param_groups\w*?_(\d+)__params___(\d+)", leaf.name)
    return f"param_groups[{found[1]}]['params'][{found[2]}]" if found else None
