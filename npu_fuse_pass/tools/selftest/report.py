"""The selftest's one file: Markdown to read, with everything as JSON at its end, to attach to an issue.

It is written anew before each part, so that after a crash of the process the file names the part.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from typing import Any

from npu_fuse_pass.tools.selftest.environment import Finding


@dataclasses.dataclass
class Report:
    """The results so far.

    Attributes:
        doing: the part that runs; "" when all is done.
        verdict: one sentence; "" until there is one.
        generated: parity with generated kernels.
        proof: what followed from it.
    """

    path: pathlib.Path
    platform: str
    quick: bool
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())
    doing: str = ""
    verdict: str = ""
    environment: list[Finding] = dataclasses.field(default_factory=list)
    parity: list[Any] = dataclasses.field(default_factory=list)
    generated: list[Any] = dataclasses.field(default_factory=list)
    timing: list[Any] = dataclasses.field(default_factory=list)
    constants: dict[str, float] = dataclasses.field(default_factory=dict)
    proof: str = ""

    def begin(self, part: str) -> None:
        """Record the part that comes next, also in the file."""
        self.doing = part
        self.write()

    def finish(self, verdict: str) -> None:
        """Record the verdict."""
        self.doing, self.verdict = "", verdict
        self.write()

    def write(self) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(self.text(), encoding="utf-8")
        new.replace(self.path)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        fields = dataclasses.asdict(self)
        del fields["path"]
        return {"selftest": 1, **fields}

    def text(self) -> str:
        """The whole file."""
        verdict = self.verdict or f"**not finished**: the process ended, or still is, in: {self.doing}"
        parts = [f"# npu-fuse-pass selftest\n\n{self.date}, platform {self.platform}, quick {self.quick}\n\n{verdict}"]
        parts.append("## Environment\n\n" + "\n".join(f"- {_cell(f)}" for f in self.environment))
        if self.parity:
            parts.append(f"## Parity with float64 on the CPU, five steps\n\n{self._parity(self.parity)}")
        if self.constants:
            listed = ", ".join(f"{name}: {value:.1f}" for name, value in self.constants.items())
            parts.append(f"## This device\n\n{listed}")
        if self.timing:
            parts.append(f"## Milliseconds per step, synchronised, medians of interleaved steps\n\n{self._timing()}")
        if self.proof:
            rows = f"\n\n{self._parity(self.generated)}" if self.generated else ""
            parts.append(f"## The same with generated kernels\n\n{self.proof}{rows}")
        parts.append(f"## All of it\n\n```json\n{json.dumps(self.to_json(), indent=1)}\n```\n")
        return "\n\n".join(parts)

    def _parity(self, outcomes: list[Any]) -> str:
        rows = []
        for o in outcomes:
            error = "-" if o.error is None else f"{o.error:.1e}"
            rows.append([o.name, o.verdict, error, f"{o.tolerance:.0e}", "; ".join(dict.fromkeys(o.kernels)), o.why])
        return _table(["optimizer", "verdict", "max relative error", "allowed", "kernels", "why"], rows)

    def _timing(self) -> str:
        rows = []
        for t in self.timing:
            ours = t.milliseconds.get("ours")
            for name, ms in t.milliseconds.items():
                ratio = "" if ours is None or name == "ours" else f"{ms / ours:.2f}x"
                rows.append([t.workload, t.family, name, f"{ms:.3f}", ratio, f"{t.first_call[name]:.0f}"])
            rows += [[t.workload, t.family, name, "not run", why, ""] for name, why in t.failed.items()]
        return _table(["workload", "algorithm", "contestant", "ms", "ours is faster by", "first call, ms"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "/")
