"""Drawing programs: what was drawn least for an optimizer comes first, so that no pair of both is left out for long."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from .actions import AFTER, BETWEEN, INSIDE, RETURNS
from .left_out import LEFT_OUT, OPTIMIZERS_LEFT_OUT, is_left_out
from .optimizers import OPTIMIZERS, Drawn
from .parameters import PARAMETERS, RARE

ROWS = (*PARAMETERS, *BETWEEN, *INSIDE)
STOCK = 1.5  # programs of ours for each of torch.optim, which Dynamo traces for seconds
_STATEMENT = re.compile(r"\n(?! )")


@dataclasses.dataclass(frozen=True)
class Program:
    """Lines of Python, and the names of what was drawn, each with the number of a line at which it has been done."""

    optimizer: str
    rows: tuple[tuple[str, int], ...]
    lines: tuple[str, ...]


class Draws:
    """How often each pair was drawn, and what is drawn next.

    Args:
        only: words, of which an optimizer's name, or "ours" or "stock", has to be one; empty: all optimizers.
    """

    def __init__(self, seed: int, only: Sequence[str] = ()) -> None:
        self.chance = random.Random(seed)
        drawn = [o for o in OPTIMIZERS if o.name not in OPTIMIZERS_LEFT_OUT]
        self.optimizers = [o for o in drawn if not only or {o.name, "ours" if o.ours else "stock"} & {*only}]
        self.pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        self.programs: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[Program]:
        while True:
            yield self.program()

    def program(self) -> Program:
        """The next program."""
        cost = {o: (self.programs[o.name] + 1) * (1 if o.ours else STOCK) for o in self.optimizers}
        optimizer = self.chance.choice([o for o in self.optimizers if cost[o] == min(cost.values())])
        self.programs[optimizer.name] += 1
        return _Writer(self, optimizer).write()

    def note(self, program: Program, ran: int) -> None:
        """Count what the first lines of a program did."""
        self.pairs.update((name, program.optimizer) for name, line in program.rows if line < ran)

    def pick(self, optimizer: Drawn, rows: Sequence[str], many: int) -> list[str]:
        """Some of these, those first that were drawn least."""
        rows = [row for row in rows if not is_left_out(row, optimizer)]
        order = {row: (self.pairs[row, optimizer.name], self.chance.random()) for row in rows}
        return sorted(rows, key=lambda row: order[row])[:many]

    def empty(self) -> list[tuple[str, str]]:
        """Pairs that were not drawn."""
        return [
            (row, o.name)
            for row in ROWS
            for o in self.optimizers
            if not self.pairs[row, o.name] and not is_left_out(row, o)
        ]

    def table(self) -> str:
        """Rows by optimizers; "-" is not drawn, and the lines below say why."""
        width = max(map(len, ROWS))
        known = [f"{chr(ord('A') + i)}: {o.name} ({self.programs[o.name]})" for i, o in enumerate(self.optimizers)]
        lines = ["optimizers (programs): " + ", ".join(known)]
        lines.append(f"{'':{width}} " + " ".join(f"{chr(ord('A') + i):>3}" for i in range(len(self.optimizers))))
        for row in ROWS:
            cells = [
                "-" if is_left_out(row, o) and not self.pairs[row, o.name] else str(self.pairs[row, o.name])
                for o in self.optimizers
            ]
            lines.append(f"{row:{width}} " + " ".join(f"{cell:>3}" for cell in cells))
        lines += [f"not drawn: {row} ({', '.join(names)}): {reason}" for row, (names, reason) in LEFT_OUT.items()]
        lines += [f"not drawn: {name}: {reason}" for name, reason in OPTIMIZERS_LEFT_OUT.items()]
        return "\n".join(lines)


class _Writer:
    """Writes one program."""

    def __init__(self, draws: Draws, optimizer: Drawn) -> None:
        self.draws, self.optimizer, self.chance = draws, optimizer, draws.chance
        self.rows: list[tuple[str, int]] = []
        self.lines: list[str] = []
        self.seed = 0
        self.inside: list[str] = []

    def write(self) -> Program:
        kinds = self.draws.pick(self.optimizer, [k for k in PARAMETERS if k not in RARE], self.chance.choice((1, 2)))
        if "state_dtype" in self.optimizer.name:
            kinds.append(self.chance.choice(("float16", "bfloat16")))  # what the option is for
        kinds += (
            self.draws.pick(self.optimizer, RARE, 1)
            if self.chance.random() < (0.35 if self.lacks(RARE) else 0.15)
            else []
        )
        for kind in ("plain", *kinds) if len(kinds) < 2 else kinds:
            self.add(kind, PARAMETERS[kind])
        made = f"opt = {self.optimizer.text}"
        self.made = f"{made}  #= opt = {self.optimizer.stock}" if self.optimizer.stock else made
        self.lines.append(self.made)
        if self.chance.random() < (0.7 if self.lacks(INSIDE) else 0.5):
            self.inside = self.draws.pick(self.optimizer, list(INSIDE), self.chance.choice((1, 2, 3, 4)))
            self.function()
        elif self.chance.random() < 0.3:
            name = self.chance.choice(("compile_step", "compile_optimizer_", "check_numerics"))
            self.add(name, BETWEEN[name])
        if not self.lines[-1].startswith("step = "):
            self.lines.append(f"step = {self.again}")
        self.steps(self.chance.choice((1, 2)))
        usable = [k for k in BETWEEN if not (self.inside and k == "closure")]
        for name in self.draws.pick(self.optimizer, usable, self.chance.choice((3, 4, 5, 6))):
            if self.chance.random() < 0.75:
                self.gradients()
                self.add(name, BETWEEN[name])
                self.lines.append(f"step({self.call})")
            else:
                self.add(name, BETWEEN[name])
                self.steps(1)
        self.steps(1)
        return Program(self.optimizer.name, tuple(self.rows), tuple(self.lines))

    @property
    def again(self) -> str:
        return "compiled(body)" if self.inside else "compiled(opt.step)"

    @property
    def call(self) -> str:
        return str(self.chance.choice((0.1, 0.05, 0.025))) if self.inside else ""

    def lacks(self, rows: Iterable[str]) -> bool:
        """Whether one of these was never drawn for the optimizer."""
        return any(not self.draws.pairs[row, self.optimizer.name] for row in rows)

    def gradients(self) -> None:
        self.seed += 1
        self.lines.append(f"gradients(ps, {self.seed})")

    def steps(self, many: int) -> None:
        for _ in range(many):
            self.gradients()
            self.lines.append(f"step({self.call})")

    def add(self, name: str, template: str) -> None:
        self.rows.append((name, len(self.lines)))
        self.lines += _STATEMENT.split(self.fill(template))

    def function(self) -> None:
        before = [n for n in self.inside if n not in AFTER or self.chance.random() < 0.5]
        after = [n for n in self.inside if n not in before]
        text = "def body(x):\n"
        for names, then in ((before, "    opt.step()"), (after, "")):
            inner = "\n".join(self.fill(INSIDE[n]) for n in names)
            if inner:
                text += "    with torch.no_grad():\n" + textwrap.indent(inner, " " * 8) + "\n"
            text += then + "\n" if then else ""
        if any(n.startswith(RETURNS) for n in self.inside):
            text = text.replace("\n", "\n    returned = []\n", 1) + "    return returned\n"
        self.rows += [(name, len(self.lines) + 4) for name in self.inside]  # behind the first step
        self.lines += ["average = torch.zeros(())"] if "average" in text else []
        self.lines += [BETWEEN["names follow"]] if "named" in text else []
        self.lines.append(text.rstrip())

    def fill(self, template: str) -> str:
        self.seed += 1
        numbers = (*self.optimizer.numbers, ("lr", "0.02"))
        h, v = self.chance.choice(numbers[: max(1, len(numbers) - 1)])
        call = self.call
        return template.format(
            i=self.chance.choice((0, 0, 1)),
            j=self.chance.choice((1, -1)),
            lr=self.chance.choice((0.03, 0.01, 0.2)),
            n=self.chance.choice(self.optimizer.states),
            h=h,
            v=v,
            s=self.seed,
            call=call,
            comma=", " if call else "",
            again=self.again,
            make=self.made if hasattr(self, "made") else "",
        )
