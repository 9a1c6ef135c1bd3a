"""Random programs until the time is over: findings, shrunk to scripts of their own, and what was drawn."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

from .draw import Draws, Program
from .shrink import Lines, shrink
from .twin import check

MAIN = """

PROGRAM = [
{lines}
]

if __name__ == "__main__":
    import sys

    kind, what, _ = check(PROGRAM)
    print(f"expected no difference; got {{kind}}: {{what}}" if kind else "expected no difference; got none")
    sys.exit(1 if kind else 0)
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A program that shows a difference, and what it shows; shrunk."""

    kind: str
    what: str
    lines: Lines
    program: Program

    def script(self) -> str:
        """A file of its own that exits 1 while the difference is there."""
        text = pathlib.Path(__file__).with_name("twin.py").read_text(encoding="utf-8")
        _, _, rest = text.partition('"""\n')
        said = "\n".join(f"# {line}" for line in self.what.splitlines())
        return f'"""A random program: {self.kind}."""\n{said}\n{rest}' + MAIN.format(
            lines="\n".join(f"    {line!r}," for line in self.lines)
        )


@dataclasses.dataclass
class Outcome:
    """What the programs of one seed showed."""

    draws: Draws
    programs: int = 0
    fused: int = 0
    steps: int = 0
    reasoned: int = 0
    seconds: float = 0.0
    busy: float = 0.0  # seconds of processors
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rate = 60 * self.programs / max(self.busy, 1)
        return (
            f"{self.programs} programs in {self.seconds:.0f} s, {self.busy:.0f} s of processor ({rate:.0f} a minute); "
            f"{self.fused} of {self.steps} steps fused, {self.reasoned} programs with a reason why something was not; "
            f"{len(self.findings)} findings"
        )


def search(
    draws: Draws,
    go_on: Callable[[Outcome], bool],
    shrinks: int = 100,
    each: Callable[[Finding], None] = lambda finding: None,
) -> Outcome:
    """Run programs while `go_on` says so; `each` gets every finding, of each kind of program once."""
    outcome = Outcome(draws)
    known: set[tuple[str, Lines]] = set()
    begin = time.perf_counter(), time.process_time()
    for program in outcome.draws:
        kind, what, got = check(program.lines)
        draws.note(program, len(got.errors) - (got.errors[-1] is not None))
        outcome.programs += 1
        outcome.steps += len(got.fused)
        outcome.fused += sum(got.fused)
        outcome.reasoned += bool(got.reasons)
        outcome.seconds, outcome.busy = time.perf_counter() - begin[0], time.process_time() - begin[1]
        if kind:
            finding = shrunk(program, kind, what, shrinks)
            if (kind, finding.lines) not in known:
                known.add((kind, finding.lines))
                outcome.findings.append(finding)
                each(finding)
        if not go_on(outcome):
            return outcome
    raise AssertionError("programs do not end")


def shrunk(program: Program, kind: str, what: str, tries: int) -> Finding:
    """The finding of a program, as short as it gets in so many tries."""
    lines = shrink(program.lines, lambda candidate: check(candidate)[0] == kind, tries)
    return Finding(kind, check(lines)[1] or what, lines, program)


def told(findings: Sequence[Finding]) -> Iterator[str]:
    """Each with its shrunk program."""
    for finding in findings:
        yield f"{finding.kind}: {finding.what}\n" + "\n".join(finding.lines)
