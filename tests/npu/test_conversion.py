"""Every stock optimizer, ours with all their options, and rules that a user wrote: as GE graphs, and the same numbers.

From `torch.compile` through the whole pipeline and the real torchair to the interpreter. Each optimizer has float32,
float16 and bfloat16 parameters, in one step. That everything was fused is read from the reports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import harness
import pytest
import torch
from steps import assert_close, set_gradients
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.tolerances import PROMISED
from optimizers import paddle
from scripts import conversion_cases
from scripts.conversion_cases import Make, Row
from tests.support.tolerances import ADADELTA_NPU, STOCK_NPU

TENSORS = [((4, 5), torch.float32), ((7,), torch.float32), ((3, 2), torch.float16), ((2, 1, 4), torch.bfloat16)]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in TENSORS]


def same_numbers(make: Make, tolerance: Mapping[torch.dtype, float], steps: int = 5) -> torch.optim.Optimizer:
    """Compiled for NPUs and eager, side by side; returns the compiled one."""
    both = parameters(), parameters()
    ours, eager = make(both[0]), make(both[1])
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu"})
    for k in range(steps):
        for params in both:
            set_gradients(params, k)
        step()
        eager.step()
        for p, q in zip(*both, strict=True):
            assert_close(p.detach(), q.detach(), tolerance[p.dtype])
    for p, q in zip(*both, strict=True):
        for name, value in eager.state[q].items():
            if isinstance(value, Tensor):
                assert_close(ours.state[p][name], value, tolerance[p.dtype])
    return ours


def assert_all_fused(graphs: harness.Recording, steps: int = 5) -> None:
    assert sum(g.runs for g in graphs) == steps
    for report in npu_fuse_pass.reports():
        assert report.platform == "npu" and report.fallback is None and not report.unfused
        assert {g.lowering for g in report.groups} == {"npu"}
        assert sum(g.updates for g in report.groups) == len(TENSORS)
    for graph in graphs:
        assert set(graph.counts()) <= set(elementwise.DOCUMENTS)


@pytest.mark.parametrize("row", conversion_cases.STOCK, ids=lambda row: row.name)
def test_a_stock_optimizer(row: Row, ge: harness.Recording) -> None:
    same_numbers(row.make, ADADELTA_NPU if "Adadelta" in row.name else STOCK_NPU)
    assert_all_fused(ge)


@pytest.mark.parametrize("name", conversion_cases.RULES)
def test_a_rule_that_a_user_wrote(name: str, ge: harness.Recording) -> None:
    same_numbers(conversion_cases.RULES[name], PROMISED)
    assert_all_fused(ge)


# option -> its values; every pair of values of two options occurs in a case
OPTIONS: dict[str, tuple[Callable[..., Any], dict[str, Sequence[Any]]]] = {
    "NpuFusedSGD": (
        lambda p, **o: optimizers.NpuFusedSGD(p, lr=0.02, **o),
        dict(momentum=[0.9, 0.0], dampening=[0.3, 0.0], weight_decay=[0.1, 0.0], nesterov=[False, True]),
    ),
    "NpuFusedAdam": (
        lambda p, **o: optimizers.NpuFusedAdam(p, lr=0.02, **o),
        dict(amsgrad=[True, False], weight_decay=[0.1, 0.0], betas=[(0.8, 0.9), (0.9, 0.999)], eps=[1e-3, 1e-8]),
    ),
    "NpuFusedAdamW": (
        lambda p, **o: optimizers.NpuFusedAdamW(p, lr=0.02, **o),
        dict(amsgrad=[True, False], weight_decay=[0.1, 0.0], betas=[(0.8, 0.9), (0.9, 0.999)], eps=[1e-3, 1e-8]),
    ),
    "NpuFusedLamb": (
        lambda p, **o: optimizers.NpuFusedLamb(p, lr=0.02, **o),
        dict(adam=[False, True], use_global_grad_norm=[True, False], weight_decay=[0.1, 0.0]),
    ),
    "NpuFusedRMSpropTF": (
        lambda p, **o: optimizers.NpuFusedRMSpropTF(p, lr=0.02, eps=1e-3, **o),
        dict(momentum=[0.9, 0.0], centered=[True, False], weight_decay=[0.1, 0.0])
        | dict(decoupled_decay=[True, False], lr_in_momentum=[True, False]),
    ),
    "paddle.RMSProp": (
        lambda p, **o: paddle.RMSProp(0.02, parameters=p, epsilon=1e-3, **o),
        dict(momentum=[0.9, 0.0], centered=[True, False], weight_decay=[None, 0.1, paddle.regularizer.L1Decay(0.1)])
        | dict(
            grad_clip=[
                None,
                paddle.clip.ClipGradByValue(0.5),
                paddle.clip.ClipGradByNorm(0.5),
                paddle.clip.ClipGradByGlobalNorm(0.5),
            ]
        ),
    ),
}
REFUSED = [dict(nesterov=True, momentum=0.0), dict(nesterov=True, dampening=0.3)]


def pairs_of(case: Mapping[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def cases_of(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, int]]:
    """Few combinations of options, as indices of their values: every allowed pair occurs in one of them."""
    allowed = []
    for chosen in itertools.product(*(range(len(v)) for v in values.values())):
        case = dict(zip(values, chosen, strict=True))
        options = {name: values[name][index] for name, index in case.items()}
        if not any(wrong.items() <= options.items() for wrong in REFUSED):
            allowed.append(case)
    missing = set[frozenset[tuple[str, int]]]().union(*map(pairs_of, allowed))
    while missing:
        best = max(allowed, key=lambda case: len(missing & pairs_of(case)))
        missing -= pairs_of(best)
        yield best


CASES = [
    pytest.param(name, case, id=f"{name}-" + "".join(map(str, case.values())))
    for name, (_, values) in OPTIONS.items()
    for case in cases_of(values)
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_ours_with_all_options(name: str, case: Mapping[str, int], ge: harness.Recording) -> None:
    make, values = OPTIONS[name]
    options = {option: values[option][index] for option, index in case.items()}
    same_numbers(lambda params: make(params, **options), PROMISED)
    assert_all_fused(ge)


def test_the_pairs_of_options_are_all_there() -> None:
    for name, (_, values) in OPTIONS.items():
        found = [case.values[1] for case in CASES if case.values[0] == name]
        for (first, a), (second, b) in itertools.combinations(values.items(), 2):
            there = {(case[first], case[second]) for case in found}
            absent = set(itertools.product(range(len(a)), range(len(b)))) - there
            refused = [
                {first: a[i], second: b[j]} in REFUSED or {second: b[j], first: a[i]} in REFUSED for i, j in absent
            ]
            assert all(refused), (name, first, second, absent)


def test_adafactor_is_never_shown_to_a_backend() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 5))]
    set_gradients(params, 0)
    report = npu_fuse_pass.explain(conversion_cases.ADAFACTOR.make(params), platform="npu")
    assert "Adafactor reads its step counter with item()" in str(report.fallback)
