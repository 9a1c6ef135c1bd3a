"""Which stage is wrong can be read from a dump: each file shows what its stage made, and nothing of a later one."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import pytest
import torch

import optimizers
from npu_fuse_pass.dump import write
from npu_fuse_pass.dump.text import group_text
from tests.support.training import assert_fused, gradients, last_report, parameters, set_gradients

SHAPES = ((3, 4), (3, 4), (5,))
MAKE = {
    "Adam": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
    "NpuFusedAdam": lambda p: optimizers.NpuFusedAdam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
}


@pytest.fixture(params=MAKE)
def contents(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What there is to show of a compile."""
    kept: list[Any] = []
    monkeypatch.setattr(write, "write", lambda root, make: kept.append(make()))
    torch._dynamo.reset()
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    options = {"dump": str(tmp_path)}
    torch.compile(MAKE[request.param](params).step, backend="npu_fused", options=options)()
    assert_fused(last_report(), parameters=len(params))
    return kept[-1]


def test_what_was_captured_is_shown_whatever_grouping_makes_of_it(contents: Any) -> None:
    (group,) = contents.grouped.groups
    rotated = [tuple(m[1:] + m[:1]) for m in group.members]
    grouped = dataclasses.replace(group, labels=group.labels[::-1], members=tuple(rotated))
    wrong = dataclasses.replace(contents, grouped=dataclasses.replace(contents.grouped, groups=(grouped,)))
    name = re.compile("update_[0-9a-f]{8}|in no group")

    def shown(c: Any) -> str:
        return name.sub("", group_text.updates(c)).replace(", ", "")

    assert shown(wrong) == shown(contents)
    text = group_text.updates(contents)
    assert "3 parameters are updated" in text and re.search(r"^    param' = ", text, re.MULTILINE)
    assert text.count(f"\n{group.name}  × ") == (2 if contents.original is not None else 1)  # two learning rates


def test_a_slot_names_the_leaf_that_is_bound_to_it(contents: Any) -> None:
    """Beside its label, which is only a label: here they are exchanged."""
    (group,) = contents.grouped.groups
    at = {label: slot for slot, label in enumerate(group.labels)}
    labels = list(group.labels)
    labels[at["exp_avg"]], labels[at["exp_avg_sq"]] = "exp_avg_sq", "exp_avg"
    mislabelled = dataclasses.replace(group, labels=tuple(labels))
    wrong = dataclasses.replace(contents, grouped=dataclasses.replace(contents.grouped, groups=(mislabelled,)))
    for name, c in (("exp_avg", contents), ("exp_avg_sq", wrong)):
        row = next(r for r in group_text.groups(c).splitlines() if re.match(rf"\s+\${at['exp_avg']}\s", r))
        assert re.match(rf"\s+\$\d+\s+{name}\s", row), row
        bound = contents.captured.leaves[group.members[0][at["exp_avg"]]].name
        assert bound in row and "3 of them" in row, row


class Counting(torch.optim.Optimizer):
    """Updates a state by itself, beside the parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"param_seen": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["param_seen"].mul_(0.9).add_(1)
            p.sub_(p.grad, alpha=0.1)


def test_states_that_are_updated_by_themselves_are_no_parameters(tmp_path: pathlib.Path) -> None:
    torch._dynamo.reset()
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    torch.compile(Counting(params).step, backend="npu_fused", options={"dump": str(tmp_path)})()
    assert len(last_report().groups) == 2 and last_report().updated == len(params) == 3
    assert str(last_report()).startswith("npu_fused on cpu: 3 parameters -> 2 kernel calls")
    for name in ("01_updates.txt", "02_groups.txt", "03_fused_graph.py"):
        (text,) = (path.read_text() for path in tmp_path.rglob(name))
        assert text.count("× 3 parameters") == text.count("× 3 updates") == 1, text
    (text,) = (path.read_text() for path in tmp_path.rglob("01_updates.txt"))
    assert text.startswith("3 parameters are updated") and "    param_seen' = param_seen·0.9 + 1" in text
