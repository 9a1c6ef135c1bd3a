"""Planted bugs in when a generated kernel reads and writes. See mutations.py."""

from __future__ import annotations

from tests.support.mutations import Mutation


def _passes(name: str) -> tuple[str, ...]:
    return (f"tests/unit/lowerings/test_cpu_passes.py::test_{name}",)


PASSES = [
    Mutation(
        "a state is written while a later pass needs the old one",
        "_Search._scheduled",
        "missed |= written & set(old.values())",
        "missed |= set()",
        _passes("the_fewest_bytes_the_same_bits[needs_old]"),
    ),
    Mutation(
        "contributions that are computed twice write",
        "_Search._early",
        "waits = totals is None or any(x.op",
        "waits = totals is not None and any(x.op",
        _passes("contributions_that_are_computed_twice_write_nothing"),
    ),
    Mutation(
        "a state is written before the sum that it needs is known",
        "_Search._early",
        "not x.tensor and x.value in totals for",
        "not x.tensor and x.value in () for",
        _passes("the_fewest_bytes_the_same_bits[waits_for_all]"),
    ),
    Mutation(
        "a value that memory rounded is read back",
        "_Search._early",
        "if e.dtype != self._formula.slots[slot].dtype:",
        "if False:",
        _passes("a_value_that_memory_rounds_is_not_read_from_there"),
    ),
    Mutation(
        "parameters that one thread takes alone are updated twice",
        "_Function._driver",
        "a.active[m] && a.numel[m] > small",
        "a.active[m]",
        _passes("the_fewest_bytes_the_same_bits[scaled]"),
    ),
]
