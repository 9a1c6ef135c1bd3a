"""Every code block of the five documents runs, and what they print or promise in comments is so.

Imports are mapped (torch_npu.optim to optimizers, torch_npu.npu.amp to torch.amp, paddle to paddle_shim.py)
and `.npu()` is dropped; nothing else is changed. The last test holds signatures against the prototypes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from optimizers.paddle import RMSProp
from tests.goldens import doc_example_parameters
from tests.support import oracles, paddle_shim
from tests.support.training import MODES, assert_close, assert_fused, last_report

DOCUMENTS = sorted((Path(__file__).parents[2] / "tests" / "seeds").glob("*.txt"))
FENCED = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^\.\. code-block:: python\n((?:[ \t]+.*\n|\s*\n)+)", re.MULTILINE)
PROTOTYPE = re.compile(r"^(?:class |\.\. py:class:: )([\w.]+)(\(.*\))$", re.MULTILINE)
FORMULAS = {
    "NpuFusedSGD": oracles.sgd,
    "NpuFusedAdam": oracles.adam,
    "NpuFusedLamb": oracles.lamb,
    "NpuFusedRMSpropTF": oracles.rmsprop_tf,
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block of a document."""

    document: str
    code: str

    def runnable(self) -> str:
        """The code with imports mapped and `condition # True` made an assertion."""
        code = self.code.replace("torch_npu.npu.amp", "torch.amp").replace("torch_npu.optim", "optimizers")
        code = code.replace(".npu()", "")
        return re.sub(r"^( *)(np\.allclose\(.*\)) *# True$", r"\1assert \2", code, flags=re.MULTILINE)

    def printed(self) -> list[str]:
        """What its comments say that it prints: `print(x) # value`, and lines that follow `# Print:`."""
        said = re.findall(r"^ *print\(.*\) # (.*)$", self.code, flags=re.MULTILINE)
        below = re.search(r"^ *# Print:\n((?: *#.*\n?)*)", self.code, flags=re.MULTILINE)
        return said + [line.strip("# \n") for line in (below[1].splitlines() if below else [])]

    def run(self, **scope: Any) -> dict[str, Any]:
        """Execute it; returns its names."""
        names = {"__name__": "example", **scope}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(self.runnable(), self.document, "exec"), names)
        assert out.getvalue().splitlines() == self.printed()
        return names


def blocks(pattern: re.Pattern[str]) -> list[Block]:
    found = [(d.name, m) for d in DOCUMENTS for m in pattern.findall(d.read_text())]
    return [Block(name, textwrap.dedent(code).strip("\n")) for name, code in found]


NPU, PADDLE = blocks(FENCED), blocks(DIRECTIVE)


def test_all_blocks_are_found() -> None:
    assert len(DOCUMENTS) == 5
    assert len(NPU) == 4
    assert len(PADDLE) == 6
    assert sum(d.read_text().count("import torch\n") + d.read_text().count("import paddle\n") for d in DOCUMENTS) == 10
    assert [b.printed() for b in PADDLE if b.printed()] == [[f"current lr is 0.{i}" for i in range(2, 7)], ["0.001"]]
    assert sum(b.runnable().count("assert np.allclose") for b in PADDLE) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", NPU, ids=lambda b: re.search("optim import (\\w+)", b.code)[1])
def test_npu_example(block: Block, mode: str) -> None:
    if mode == "compiled":
        npu_fuse_pass.clear_reports()
        step = 'torch.compile(fused_opt.step, backend="npu_fused", fullgraph=True)()'
        assert "fused_opt.step()" in block.code
        block = dataclasses.replace(block, code=block.code.replace("fused_opt.step()", step))
    names = block.run()
    before = doc_example_parameters()
    oracle = oracles.Oracle(FORMULAS[type(names["fused_opt"]).__name__], before, names["opt_kwargs"])
    oracle.step([p.grad for p in before])
    assert_close(names["params"], oracle.values)
    assert torch.equal(names["params"][-1], before[-1])
    assert not torch.equal(names["params"][0], before[0])
    if mode == "compiled":
        assert_fused(last_report(), parameters=6)


@pytest.mark.parametrize("block", PADDLE, ids=range(6))
def test_paddle_example(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "paddle", paddle_shim)
    seen: list[list[torch.Tensor]] = []
    step = RMSProp.step

    def recorded(self: RMSProp) -> None:
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        step(self)
        seen.append([p.detach() - b for p, b in zip(self.param_groups[0]["params"], before, strict=True)])

    monkeypatch.setattr(RMSProp, "step", recorded)
    names = block.run()
    if "backward()" in block.code:
        assert len(seen) == 1
        assert all(change.any() for change in seen[0])
        assert all(not p.grad.any() for p in names["linear"].parameters())  # cleared
    if "scheduler" in block.code:
        assert len(seen) == 12


def prototypes() -> list[tuple[str, str]]:
    return [m for d in DOCUMENTS for m in PROTOTYPE.findall(d.read_text())]


@pytest.mark.parametrize("prototype", prototypes(), ids=lambda p: p[0])
def test_signature_is_the_documents(prototype: tuple[str, str]) -> None:
    name = prototype[0].rpartition(".")[2]
    arguments = ast.parse(f"lambda {prototype[1][1:-1]}: 0", mode="eval")
    want = arguments.body.args
    cls = RMSProp if name == "RMSProp" else getattr(optimizers, name)
    got = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in got] == [a.arg for a in want.args]
    defaults = [ast.literal_eval(d) for d in want.defaults]
    assert [p.default for p in got][len(got) - len(defaults) :] == defaults
