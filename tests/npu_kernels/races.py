"""Race check of the compiler's last IR: vector clocks over a core's pipes.

A core runs its pipes (scalar unit, vector unit, copies in, copies out) side by side; only set_flag and wait_flag, and
barriers, order them. Two accesses of the same bytes, one of them a write, must be ordered. Right numbers on a CPU say
nothing about that: there one operation runs after another.

The scalar unit issues the other pipes' operations. It has what it reads before it issues the next one; what it writes
may still be under way then, and needs a flag.

Not shown: order between cores (chunks are disjoint), nor whether hivmc keeps the flags.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from npu_fuse_pass.lowerings.npu.kernels.pipes import COPY_IN, COPY_OUT, SCALAR, Pipes

_HISTORY = 600  # earlier accesses of one kind of memory that an access is compared with: some trips of the loop


class Races(Pipes):
    """A watcher of one block.

    Attributes:
        found: pairs of lines that race, and how often.
        loads: of the copies in after the first trips, how many there were,
        waiting: and how many of them started after all copies out before them had finished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.loads = self.waiting = 0
        self._accesses: dict[str, deque[tuple[str, str, int, bool, int, int]]] = {}

    def operation(self, pipe: str, line: str, accesses: Sequence[tuple[bool, str, int, int]]) -> None:
        """One operation and the bytes that it touches."""
        clock = self.start(pipe)
        number = self.count[pipe]
        if pipe == COPY_IN and self.count[COPY_OUT] > 6:
            self.loads += 1
            self.waiting += clock.get(COPY_OUT, 0) >= self.count[COPY_OUT]
        for writes, space, start, size in accesses:
            if size <= 0:
                continue
            before = self._accesses.setdefault(space, deque(maxlen=_HISTORY))
            for other, other_pipe, other_number, other_writes, other_start, other_end in before:
                if start >= other_end or other_start >= start + size or not (writes or other_writes):
                    continue
                if other_pipe == SCALAR and not other_writes:
                    continue  # the scalar unit has what it reads before it issues anything else
                if (other_pipe, other_number) != (pipe, number) and clock.get(other_pipe, 0) < other_number:
                    self.found[other, line] += 1
            before.append((line, pipe, number, writes, start, start + size))

    @property
    def left(self) -> list[tuple[str, str, object]]:
        """The flags that are still set: whatever kernel the core runs next would not wait for its own."""
        return [flag for flag, waiting in self._flags.items() if waiting]

    def wait_flag(self, source: str, target: str, event: object) -> bool:
        known = super().wait_flag(source, target, event)
        if not known:
            self.found["wait without set", f"{source} -> {target} {event}"] += 1
        return known
