"""What scripts/zoo.py makes of steps: a difference, a result with its reasons, an order, a page."""

from __future__ import annotations

import math
import pathlib
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # its modules import each other as scripts do

import zoo  # noqa: E402
import zoo_record  # noqa: E402
from zoo_classes import SAMPLE, construct  # noqa: E402
from zoo_run import NUMBERS_LEFT, Phase, Twin, compiled, difference, eager, fused, operations, run_plainly, verdict  # noqa: E402  # noqa: E402

from npu_fuse_pass.reasons import Code  # noqa: E402
from npu_fuse_pass.report.report import CompileReport, GroupReport  # noqa: E402


class Halved(torch.optim.Optimizer):
    """Its state remembers what it is asked to add; `reads` makes it read a tensor in Python."""

    def __init__(self, params: Any, lr: float, reads: bool = False) -> None:
        super().__init__(params, dict(lr=lr))
        self.reads = reads

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if self.reads and p.grad.sum() > 1e9:
                continue
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class Reads(Halved):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, reads=True)


def group(launches: int = 1) -> GroupReport:
    return GroupReport("g", "p' = p", 6, "float32", "cpu", "cpu", "k", 12, launches)


def ran(**fields: Any) -> Phase:
    return Phase(**{"compiles": [1, 0, 1, 0, 0, 0], "ran": [CompileReport("cpu", groups=[group()])], **fields})


def test_a_whole_step_and_a_step_that_reads_a_tensor() -> None:
    want, plain = eager(Twin("tests", Halved, "plain"))
    ours = fused("tests", Halved, "plain", want)
    assert ours.difference[0] <= 1e-6 and ours.compiles[:2] == [0, 1] and plain.left == {"add_": 6}
    assert verdict(ours, plain, None, False)[0].startswith("fused")
    want, plain = eager(Twin("tests", Reads, "plain"))
    result, why = verdict(fused("tests", Reads, "plain", want), plain, None, False)
    assert result == "not reached" and "Data-dependent branching" in " ".join(why)


class Keyed(Halved):
    """Finds what it keeps by addresses: Dynamo does not know them, skips the step and compiles what it calls."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.rows = {p.data_ptr(): i for i, p in enumerate(self.param_groups[0]["params"])}

    def row(self, p: torch.Tensor) -> int:
        if p.data_ptr() not in self.rows:
            raise KeyError("no row")
        return self.rows[p.data_ptr()]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        group = self.param_groups[0]
        group["step"] = group.get("step", torch.tensor(0)) + 1
        lr = group["lr"] * group["step"] / group["step"].clamp(min=3)
        _update(sorted(group["params"], key=self.row), lr)


def _update(params: Any, lr: torch.Tensor) -> None:
    for p in params:
        p.sub_(p.grad * lr)


def test_what_dynamo_skips_is_left_with_its_reason() -> None:
    want, plain = eager(Twin("tests", Keyed, "plain"))
    ours = fused("tests", Keyed, "plain", want)
    assert ours.difference[0] <= 1e-6 and len(ours.ran) == 1
    result, why = verdict(ours, plain, None, False)
    assert result == "partly" and why[0] == f"{NUMBERS_LEFT}: add x1, mul x1, clamp x1, div x1"
    assert "Observed exception (raised exception KeyError('no row'))" in why


class Closes(Halved):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        super().step()
        return loss


def test_what_a_closure_computes_is_not_the_optimizers() -> None:
    want, plain = eager(Twin("tests", Closes, "closure"))
    assert plain.left == {"add_": 6}  # and not the copies of gradients
    ours = fused("tests", Closes, "closure", want)
    assert not ours.left and verdict(ours, plain, None, False)[0].startswith("fused")


def test_operations_with_single_numbers_are_told_from_others() -> None:
    n, x = torch.tensor(3), torch.ones(2)
    found = operations(lambda: (n + 1, n.clamp(min=1), x * n, torch.full((2,), 0.5), n.expand(2).contiguous(), x.sum()))
    assert found == {"add of numbers": 1, "clamp of numbers": 1, "mul": 1, "full": 1, "contiguous": 1, "sum": 1}


def test_values_that_differ_are_seen_and_so_is_an_error() -> None:
    want, plain = eager(Twin("tests", Halved, "plain"))
    twin = Twin("tests", Halved, "plain")

    def late() -> None:
        twin.opt.step()
        twin.params[3].data[0] += 0.5

    wrong = compiled(twin, want, late)
    assert verdict(wrong, plain, Phase(), False) == ("wrong", [f"parameter 3 differs by {wrong.difference[0]:.1e}"])
    raised = compiled(Twin("tests", Halved, "plain"), want, lambda: 1 / 0)
    assert verdict(raised, plain, Phase(), False) == ("crash", ["step 1: ZeroDivisionError: division by zero"])
    assert verdict(raised, plain, Phase(error="too"), False)[0] == "not reached"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0]), 0.2),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), float("inf")),
        (torch.ones(1), torch.ones(()), float("inf")),
        (torch.tensor(float("nan")), torch.tensor(1.0), float("inf")),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), 0.0),
        (3, 3, 0.0),
    ],
    ids=["value", "dtype", "shape", "nan", "both nan", "number"],
)
def test_differences(a: Any, b: Any, expected: float) -> None:
    assert difference({"x": a}, {"x": b})[0] == pytest.approx(expected)
    assert difference({"x": a}, {})[0] == float("inf")


def test_results_and_their_reasons() -> None:
    plain = Phase()
    unfused = CompileReport("cpu", groups=[group()], unfused=[Code.OPERATION("has no place", op="mm")])
    cases = {
        "fused": ran(compiles=[1, 0, 0, 0, 0, 0]),
        "fused with 2 compiles: compiled again: n == 3": ran(causes=["compile", "n == 3"]),
        "fused with 2 compiles: 2 parts of its code are compiled by themselves: a branch": ran(
            causes=["compile", "compile"], breaks=["a branch"]
        ),
        "partly: mm: has no place": ran(ran=[unfused]),
        "partly: outside of what was captured: mul x2, add x1": ran(left={"mul": 2, "add of numbers": 1}),
        "partly: outside of what was captured, with single numbers alone: add x1": ran(left={"add of numbers": 1}),
        "partly: compiles anew at every step: n == 3": ran(compiles=[1] * 6, causes=["n == 3"]),
        "not reached: Dynamo skips the step": ran(compiles=[0] * 6, ran=[]),
    }
    for expected, ours in cases.items():
        result, why = verdict(ours, plain, None, False)
        assert ": ".join([result, *why]) == expected
    assert verdict(ran(difference=(0.1, "p")), plain, Phase(), False)[0] == "wrong"
    assert verdict(ran(difference=(0.1, "p")), plain, Phase(), rounding=True)[0] == "fused with 2 compiles"
    assert verdict(ran(difference=(0.1, "p")), plain, Phase(difference=(0.1, "p")), False)[0] == "fused with 2 compiles"


def test_the_order_of_results_and_the_sample() -> None:
    ordered = ["fused", "fused with 2 compiles", "fused with 10 compiles", "partly", "not reached", "wrong", "crash"]
    backwards = ordered[::-1]
    assert sorted(backwards, key=zoo.rank) == ordered
    assert len(SAMPLE) == 30 and all(zoo.rank(result) for result in SAMPLE.values())


def test_the_page_counts_and_hides_where_the_libraries_are() -> None:
    place = f"view: a part ({ROOT}/lib.py:3, in step) | more"
    rows = [
        dict(library="optimi", name="SGD", result="fused", why=[], kernels=1, microseconds=5.0, eager_microseconds=9.4),
        dict(library="optimi", name="Adam", result="fused with 3 compiles", why=[]),
        dict(library="timm.optim", name="Lion", result="partly", why=[place]),
    ]
    rows[2]["why"].append(f"{NUMBERS_LEFT}: add x1")
    text = zoo.page(rows)
    assert "Of those partly, 1 leave" in text
    assert "3 classes of 2 public libraries" in text and "2 wholly fused, 1 partly, 0 not reached" in text
    assert "| SGD | fused | 1 | 5 | 9 |  |" in text
    assert zoo._cell("a/b/site-packages/lib.py:1 (/x/site-packages/y.py:2)") == "lib.py:1 (y.py:2)"
    assert "| Lion | partly | – | – | – | view: a part (lib.py:3, in step) \\| more; outside" in text


class Powered(Halved):
    """Takes math.pow of a count in each state; `kept` makes it a part of the graph, at every step."""

    def __init__(self, params: Any, lr: float = 0.1, kept: bool = False) -> None:
        super().__init__(params, lr)
        self.kept = kept

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            factor = math.lgamma(state["step"] + 2) if self.kept else math.pow(0.9, state["step"])
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"] * factor)


class Kept(Powered):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, kept=True)


def test_compiles_of_plain_torch_compile_and_what_the_page_says_of_them() -> None:
    rows = [run_plainly("tests", cls.__name__, cls) for cls in (Powered, Kept, Reads)]
    assert [row["result"] for row in rows] == ["2 compiles", "8 compiles", "none"]
    assert rows[0]["compiles"] == [1, 1, *[0] * 8] and rows[1]["most"] == 8
    text = zoo.section(rows)
    assert "3 classes through" in text and "2 reach the backend, and 1 of these" in text
    assert "| 2 compiles | 1 |" in text and "| others, below | 2 |" in text and "tests.Powered" not in text
    assert "| tests.Kept | 8 compiles | 1 1 1 1 1 1 1 1 0 0 | compiled until torch stops, then eager; so it is" in text
    assert "| tests.Reads | none |  | Data-dependent branching" in text


def test_the_page_keeps_its_other_sections() -> None:
    times = {"compile_step": 12.3, "Inductor": "RuntimeError: no", "eager": 40.0}
    rows = [dict(library="optimi", name="SGD", result="timed", why=[], small=times, large={})]
    text = zoo.beside(rows)
    assert "| class | compile_step, small | Inductor, small | eager, small | compile_step, large |" in text
    assert "| optimi.SGD | 12 | – | 40 | – | – | – |" in text
    whole = f"# Head\n\n## timm.optim\n\n{text}\n{zoo._PLAIN}\n\nmore\n"
    parts = zoo._parts(whole)
    assert "".join(parts.values()) == whole
    assert list(parts) == ["", zoo._INDUCTOR, zoo._PLAIN] and parts[zoo._INDUCTOR].strip() == text.strip()
    assert zoo._parts("# Head\n") == {"": "# Head\n", zoo._INDUCTOR: "", zoo._PLAIN: ""}


def test_a_class_gets_usual_values_for_what_has_none() -> None:
    model = torch.nn.Linear(3, 2)
    opt = construct("tests", Halved, list(model.parameters()), model)
    assert opt.param_groups[0]["lr"] == 1e-3 and opt.param_groups[0]["params"] == list(model.parameters())


def test_what_a_recorder_would_make_of_steps() -> None:
    whole = zoo_record.Recorded(Twin("tests", Halved, "plain"))
    assert (len(whole.stretches), whole.groups, whole.why) == (1, 1, [])
    broken = zoo_record.Recorded(Twin("tests", Reads, "plain"))
    assert len(broken.stretches) == 7 and not broken.why  # a sum and its reader for each parameter, and the last update
    answers = zoo_record.Answers(whole.calls.made)
    before = [p.detach().clone() for p in whole.twin.params]
    whole.twin.step(zoo_record.step_under(whole.twin.opt, answers), 0)
    assert not answers.other and all(map(torch.equal, before, whole.twin.params))  # nothing was computed
    whole.twin.opt.param_groups[0]["params"].pop()
    answers = zoo_record.Answers(whole.calls.made[1:])
    whole.twin.step(zoo_record.step_under(whole.twin.opt, answers), 0)
    assert answers.other


def test_the_recorder_is_asked_about_what_the_page_has_not_wholly_fused() -> None:
    rows = [
        dict(library="optimi", name="SGD", result="fused", why=[]),
        dict(library="optimi", name="Adam", result="partly", why=["mm"]),
        dict(library="muon", name="Muon", result="not reached", why=["a value"]),
        dict(library="muon", name="Other", result="not run", why=["no"]),
    ]
    assert zoo_record.unfused(zoo.page(rows)) == ["optimi.Adam", "muon.Muon"]
    small = dict(eager=3, now=None, python=4, kernels=2)
    rows = [
        dict(library="a", name="B", result="one stretch", stretches=1, calls=5, small=small),
        dict(result="nothing"),
    ]
    text = zoo_record.table(rows)
    assert "| a.B | 1 | 5 | 3 | – | 6 | – | – | – |" in text and "1 one stretch, 1 nothing" in text
