"""The net under the stages that only an NPU has before lowering: an internal error there ends no training."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from steps import assert_same, step_both, twins

import npu_fuse_pass
from npu_fuse_pass import pipeline
from tests.support.cases import BY_NAME
from tests.support.training import heard


@pytest.mark.parametrize("stage", ["decide", "match", "group"])
def test_an_internal_error_ends_no_training(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("planted")

    opt, other = twins(BY_NAME["adam"])
    monkeypatch.setattr(pipeline, stage, fail)
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    options = {"platform": "npu", "verify": False}
    step = torch.compile(opt.step, backend=npu_fuse_pass.npu_fused, options=options)
    with harness.record() as graphs, heard() as said:
        step_both(opt, other, step, 3)
    assert_same(opt, other, 0.0)
    assert not len(graphs)
    (report,) = npu_fuse_pass.reports()
    assert str(report.fallback) == "internal error: ValueError: planted"
    assert sum("internal error: ValueError: planted" in text for text in said) == 1
