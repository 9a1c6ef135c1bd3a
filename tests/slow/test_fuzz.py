"""Random programs around optimizers, eagerly and compiled side by side; scripts/fuzz.py runs as many as one likes."""

from __future__ import annotations

import logging
import os
import pathlib

import pytest

from tests.fuzz import left_out, run
from tests.fuzz.actions import AFTER, BETWEEN, INSIDE
from tests.fuzz.draw import ROWS, Draws, Program, _Writer
from tests.fuzz.optimizers import BY_NAME, OPTIMIZERS
from tests.fuzz.parameters import PARAMETERS, RARE
from tests.fuzz.shrink import shrink
from tests.fuzz.twin import check, param
from tests.fuzz.twin import run as twin_run
from tests.support.forked import run_script
from tests.support.mutations import Mutation
from tests.support.planted import ROOT, copy_of_the_project, find, plant, run_tests
from tests.support.training import FULL

SEED, PROGRAMS = 2, 100  # about a minute of an idle processor
SLOW = 1000  # about ten


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Recompiles are no news here."""
    caplog.set_level(logging.ERROR, "npu_fuse_pass")


def search(seed: int, programs: int, only: tuple[str, ...] = ()) -> run.Outcome:
    """Up to the first finding."""

    def go_on(outcome: run.Outcome) -> bool:
        return not outcome.findings and outcome.programs < programs

    outcome = run.search(Draws(seed, only), go_on)
    print(outcome.draws.table())
    print(f"seed {seed}: {outcome}")
    assert not outcome.findings, outcome.findings[0].script()
    return outcome


@pytest.mark.slow
def test_random_programs() -> None:
    outcome = search(SEED, PROGRAMS)
    assert outcome.fused >= 0.6 * outcome.steps, outcome


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="the slow tier")
def test_more_random_programs() -> None:
    outcome = search(SEED + 1, SLOW)
    assert outcome.fused >= 0.6 * outcome.steps, outcome
    drawn = sum(outcome.draws.pairs.values())
    assert drawn > 2 * len(ROWS) * len(OPTIMIZERS), outcome


def test_every_pair_is_drawn() -> None:
    """By the programs of the slow tier, without running them."""
    draws = Draws(SEED)
    for _ in range(SLOW):
        program = draws.program()
        draws.note(program, len(program.lines))
    assert not draws.empty(), draws.empty()
    again = Draws(SEED)
    assert [again.program() for _ in range(20)] == [p for p, _ in zip(Draws(SEED), range(20), strict=False)]


def test_tables_name_what_there_is() -> None:
    assert {*RARE} <= {*PARAMETERS}
    assert {*AFTER} <= {*INSIDE}
    assert not {*BETWEEN} & {*INSIDE}
    assert {*left_out.LEFT_OUT} <= {*ROWS}
    assert {*left_out.OPTIMIZERS_LEFT_OUT} <= {*BY_NAME}
    known = {"*", "ours", "stock", *BY_NAME}
    assert all({*names} <= known and reason for names, reason in left_out.LEFT_OUT.values())


# every difference that there may be, in a program that has it by construction
DIFFERENT = {
    "value": "step = compiled(opt.step if mode != 'compiled' else lambda: None)",
    "error": "mode == 'compiled' and None.step",
    "promise": "promise('two and two are five', False)",
}
LINES = ("ps.append(param((3, 4)))", "opt = clipped(ps, lr=0.05)", "step = compiled(opt.step)")
STEP = ("gradients(ps, 1)", "step()")


def found(kind: str) -> run.Finding:
    lines = (*LINES, *STEP, DIFFERENT[kind], *STEP)
    seen, what, _ = check(lines)
    assert seen == kind, (seen, what)
    return run.shrunk(Program("rule with a total", (), lines), kind, what, 60)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_difference_is_found_and_shrunk(kind: str) -> None:
    finding = found(kind)
    assert DIFFERENT[kind] in finding.lines
    assert len(finding.lines) <= 5, finding.lines


def test_a_finding_is_a_script_of_its_own(tmp_path: pathlib.Path) -> None:
    """It exits 1 while the difference is there, and 0 without."""
    finding, script = found("value"), tmp_path / "finding.py"
    for text, code in ((finding.script(), 1), (finding.script().replace("mode != 'compiled'", "True"), 0)):
        script.write_text(text, encoding="utf-8")
        made = run_script(script, cwd=tmp_path, environment=environment())
        assert made.returncode == code, made.stdout + made.stderr
        assert ("got value: " in made.stdout) == bool(code), made.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_what_an_ulp_changes_as_much_is_no_finding() -> None:
    """Adam's first step divides by |g| + eps; here g is what weight decay makes of the rest of a cancellation."""
    start = param((3,), seed=1).detach()
    lines = (
        "ps.append(param((3,), seed=1))",
        "opt = optimizers.NpuFusedAdam(ps, lr=0.05, weight_decay=0.1)",
        "step = compiled(opt.step)",
        "ps[0].data.mul_(1 + (mode == 'compiled') * {off})",
        f"ps[0].data.sub_(torch.tensor({(start * (1 - 2**-22)).tolist()}))",
        "gradients(ps, 1, 'zeros')",
        "step()",
    )
    for off, kind in ((0, ""), (2**-23, ""), (1e-5, "value")):
        assert check([line.replace("{off}", str(off)) for line in lines])[0] == kind, off


def test_a_step_that_is_not_fused_without_a_reason_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.twin.BACKENDS", {"compiled": "eager"})
    assert check((*LINES, *STEP))[0] == "silent"


def test_shrinking_keeps_what_is_needed() -> None:
    lines = tuple(f"line {i}" for i in range(20))
    assert shrink(lines, lambda made: {"line 3", "line 17"} <= {*made}) == ("line 3", "line 17")
    inner = ("def f():\n    a\n    b\n    c",)
    assert shrink(inner, lambda made: "b" in "".join(made)) == ("def f():\n    b",)


@pytest.mark.parametrize("row", [row for row, text in BETWEEN.items() if "promise(" in text])
def test_no_promise_is_broken_because_lines_are_left_out(row: str) -> None:
    """Else the shrinker makes another program of a finding."""
    writer = _Writer(Draws(SEED), BY_NAME["lion"])
    writer.add("plain", PARAMETERS["plain"])
    writer.made = f"opt = {writer.optimizer.text}"
    writer.lines += [writer.made, "step = compiled(opt.step)"]
    writer.steps(1)
    writer.add(row, BETWEEN[row])
    for i in range(len(writer.lines)):
        assert not twin_run([*writer.lines[:i], *writer.lines[i + 1 :]], "eager").broken, writer.lines[i]


def test_who_refused_is_not_kept_alive() -> None:
    gone = "r = weakref.ref(opt); del opt; gc.collect(); promise('an optimizer goes', r() is None)"
    made = twin_run([*LINES[:2], "opt.load_state_dict({})", gone], "eager")
    assert isinstance(made.errors[2], KeyError)
    assert not made.broken


# One bug for each kind of fault, and with which optimizers programs are drawn until it shows.
PLANTED = [
    Mutation(
        "what a function changes before the step counts at the next one",
        "_changed",
        "return [changed[at] for at in _reachable(optimizer, changed.keys())] if changed else []",
        "return []",
        ("ours",),
    ),
    Mutation(
        "opt.state.clear() is not noted",
        "_Noting._note_change",
        "self.changes.made = True",
        "self.changes.made |= dict.__len__(self) > 0",
        ("ours",),
    ),
    Mutation(
        "a learning rate of 0 divides 0 by 0", "_quotient", "    if number is None:", "    if True:", ("AdamW loop",)
    ),
    Mutation(
        "what an operation that stays has written is lost",
        "_Operation.__call__",
        "values[result] = values[holder]",
        "values[result] = values[holder].clone().zero_()",
        ("lion", "rule with a total"),
    ),
    Mutation(
        "parameters made under inference_mode are written",
        "Prelude.prepare",
        "if any(batch.inference for batch in self.batches) and not torch.is_inference_mode_enabled():",
        "if False:",
        ("lion", "rule with a total"),
    ),
    Mutation(
        "half precision rounds once at the end",
        "evaluate",
        "return Val(b.cast(result, dtype) if dimmed and dtype.is_floating_point else result, dtype, shape)",
        "return Val(result, dtype, shape)",
        ("stock",),
    ),
    Mutation(
        "states of equal shapes are exchanged",
        "adopt",
        "_bring(list(map(local_part, batch.owners, known)), views, batch.rule.states[name].value)",
        "_bring(known, views[::-1] if len({v.shape for v in views}) == 1 else views, batch.rule.states[name].value)",
        ("NpuFusedSGD", "NpuFusedAdam"),
    ),
    Mutation(
        "clear_cache deletes whatever looks like a library",
        "clear_cache",
        "if (_LIBRARY.fullmatch(path.name) or _NOTE.fullmatch(path.name)) and not path.is_dir():",
        'if ".so" in path.name and not path.is_dir():',
        ("lion", "rule with a total"),
    ),
    Mutation(
        "loaded states are rounded to the parameter's dtype",
        "RuleOptimizer._stored",
        "else self.state_dtype or param.dtype",
        "else param.dtype",
        ("NpuFusedAdamW state_dtype",),
    ),
]


def test_planted_bugs_are_of_todays_text() -> None:
    for bug in PLANTED:
        find(ROOT, bug.place, bug.old)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="the slow tier")
@pytest.mark.parametrize("bug", PLANTED, ids=lambda b: b.name.replace(" ", "_"))
def test_a_planted_bug_is_found(bug: Mutation, tmp_path: pathlib.Path) -> None:
    copy = copy_of_the_project(tmp_path)
    plant(copy, bug.place, bug.old, bug.new)
    (copy / "tests" / "slow" / "test_planted_fuzz.py").write_text(
        "from .test_fuzz import quiet, search\n\n\ndef test_it() -> None:\n"
        f"    search({SEED}, {SLOW // 2}, {bug.tests!r})\n"
    )
    kernels = tmp_path / "kernels"
    kernels.mkdir(mode=0o700)
    settings = {"NPU_FUSE_CACHE_DIR": str(kernels), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}
    code, output = run_tests(copy, ["tests/slow/test_planted_fuzz.py"], settings, seconds=3600)
    assert code == 1, f"not found, or not run (exit code {code}):\n{output[-3000:]}"
    assert "A random program" in output, output[-3000:]
