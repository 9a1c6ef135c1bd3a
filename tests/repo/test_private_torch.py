"""Private names of torch: every one is in a table that says what happens without it, and that is what happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from npu_fuse_pass import private_torch
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.private_torch import WITHOUT
from npu_fuse_pass.reasons import Code
from scripts import private_names
from tests.support.training import FULL
from tests.support.without_names import CASES, is_attribute

LAST = {name.rpartition(".")[2]: name for name in WITHOUT if is_attribute(name)}

# name -> cases of `without_names` that are not fused without it, and the code of their reason
_TRACED = dict.fromkeys(("of_ours", "of_torch", "in_a_function"), "TORCH")
NOT_FUSED: dict[str, dict[str, str]] = {
    "torch._subclasses.fake_tensor.FakeTensorMode": {**_TRACED, "with_another_operation": "OPERATION"},
    "torch._ops.OpOverload._schema": {"with_another_operation": "OPERATION"},
    "torch.utils._python_dispatch.TorchDispatchMode": {"with_another_operation": "OPERATION"},
    "torch._dynamo.eval_frame": {"of_ours": "HOOKS"},
    "torch._dynamo.eval_frame.skip_code": {"of_ours": "HOOKS"},
}
TOGETHER = [name for name in WITHOUT if name not in NOT_FUSED]
NOT_ASKED_FOR = {
    "torch.utils._foreach_utils._group_tensors_by_device_and_dtype",  # on a newer torch
    "torch._prims_common.is_non_overlapping_and_dense",  # has two forms: the other is said to be missing
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode",  # on an older torch
    "torch._dynamo.variables.NewGlobalVariable",  # behind another one that is missing
    "torch._dynamo.config.capture_scalar_outputs",
    "torch._dynamo.config.do_not_emit_runtime_asserts",
    "torch._dynamo.config.patch",
    "torch._dynamo.config.use_numpy_random_stream",
    "torch._dynamo.source.OptimizerSource",
    "torch._dynamo.config.recompile_limit",  # at a first compile
    "torch._dynamo.exc.InternalTorchDynamoError",  # where Dynamo fails
    "torch._dynamo.exc.TorchRuntimeError",
    "torch._inductor.inductor_prims",  # where torchair is not
}


# The table -----------------------------------------------------------------------------------------------------------


def unlisted(used: dict[str, list[str]]) -> set[str]:
    return used.keys() - WITHOUT.keys() - LAST.keys()


def test_every_private_name_is_in_the_table_and_only_those() -> None:
    used = private_names.all_uses()
    assert not unlisted(used)
    assert not [name for name in WITHOUT if name not in used and name.rpartition(".")[2] not in used]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._other", "torch._other"),
        ("from torch.x import _y as z", "torch.x._y"),
        ("import torch\ntorch._dynamo.other(1)", "torch._dynamo.other"),
        ("from torch import _dynamo as d\nd.other.more", "torch._dynamo.other.more"),
        ("import torch.optim as o\ndef f(): o._functional", "torch.optim._functional"),
        ('find("torch._dynamo.other")', "torch._dynamo.other"),
        ("def f(t): return t._other", "_other"),
        ("def f(t): return t.grad._other[0].shape", "_other"),
        ('def f(t): return getattr(t, "_other", None)', "_other"),
        ('import operator\nf = operator.attrgetter("_other")', "_other"),
    ],
)
def test_a_new_private_name_is_noticed(source: str, name: str) -> None:
    assert name in unlisted(private_names.uses({"a.py": source}))


def test_what_is_the_packages_own_or_for_types_alone_is_none() -> None:
    own = "class A:\n    _x: int\n    def __init__(self): self._y = 1\n    def _f(self): return self._x, self._y"
    typed = "if TYPE_CHECKING:\n    from torch._a import B\ndef f(x: torch._a.B) -> torch._a.B: return x.__class__"
    assert not unlisted(private_names.uses({"a.py": own, "b.py": typed, "c.py": "import sys\nsys._getframe()"}))


def test_the_page_is_made_of_the_table() -> None:
    assert private_names.PATH.read_text(encoding="utf-8") == private_names.text()


# Looking up ----------------------------------------------------------------------------------------------------------


def test_looking_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    names = {"torch._no.such": "a", "torch.Tensor._no_such": "b", "torch._guards._no_such": "c"}
    monkeypatch.setattr(private_torch, "WITHOUT", names)
    monkeypatch.setattr(private_torch, "_looked_for", {})
    assert private_torch.find("torch._guards.TracingContext").__name__ == "TracingContext"
    assert private_torch.find("torch._no.such", "torch._guards.tracing") is not None
    assert not private_torch.lacking() and not caplog.messages
    for name in (*names, *names):
        assert private_torch.find(name) is None
    assert [line.partition(": ")[2] for line in private_torch.lacking()] == ["a", "b", "c"]
    assert len(caplog.messages) == 3 and all("lacks torch." in said for said in caplog.messages)
    with pytest.raises(Unsupported, match="lacks this private name") as caught:
        private_torch.need("torch._no.such")
    assert caught.value.reason.code is Code.TORCH


# Without them --------------------------------------------------------------------------------------------------------


def answers(asked: list[list[str]]) -> list[Any]:
    command = [sys.executable, "-m", "tests.support.without_names", *map(",".join, asked)]
    run = subprocess.run(command, cwd=private_names.ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [answer["names"] for answer in found] == asked, run.stderr
    return found


ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "NPU_FUSE_VERIFY"}  # which raises what is to be a reason


def complaints(answer: Any) -> list[str]:
    """What is not as the table says, of an answer of `without_names`."""
    if "failed" in answer:
        return [f"{answer['names']}: {answer['failed']}"]
    expected = {case: code for name in answer["names"] for case, code in NOT_FUSED.get(name, {}).items()}
    found = []
    for case in (c.__name__ for c in CASES):
        given, unfused = answer["cases"][case], expected.get(case)
        codes = {unfused} if unfused else {"OPERATION"} if case == "with_another_operation" else set()
        if given["error"] > 1e-6:
            found.append(f"{case}: wrong by {given['error']}")
        if set(given["codes"]) != codes or (not given["groups"] and not unfused):
            found.append(f"{case}: {given['groups']} groups, {given['codes']}\n{given['said']}")
        if "TORCH" in given["codes"] and not any(name in given["said"] for name in answer["names"]):
            found.append(f"{case}: nobody says what is missing\n{given['said']}")
    return [f"without {answer['names']}: {text}" for text in found]


def test_training_goes_on_without_any_name_that_can_be_replaced() -> None:
    """All at once; and without one that cannot."""
    replaced, needed = answers([TOGETHER, ["torch._subclasses.fake_tensor.FakeTensorMode"]])
    assert not complaints(replaced) + complaints(needed)
    lines = [line.partition(" lacks ")[2].partition(": ")[0] for line in replaced["lacking"]]
    assert {name for name in lines if not is_attribute(name)} == {
        name for name in TOGETHER if not is_attribute(name)
    } - NOT_ASKED_FOR
    last = replaced["cases"][CASES[-1].__name__]["said"]
    assert "lacks torch._C._dynamo.guards.TensorGuards: a step's tensors are compared one by one" in last


@pytest.mark.skipif(not FULL, reason="the slow tier")
@pytest.mark.parametrize("part", range(6))
def test_training_goes_on_without_each_name(part: int) -> None:
    found = answers([[name] for name in [*WITHOUT][part::6]])
    assert not [text for answer in found for text in complaints(answer)]
