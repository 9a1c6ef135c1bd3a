"""What is ordered in a core: its pipes run side by side, and only flags and barriers make one wait for another.

Vector clocks say of every pipe how many operations of each other one are finished when its next one starts.
"""

from __future__ import annotations

import re

from npu_fuse_pass.lowerings.npu.kernels.final_ir import main_loop

SCALAR, VECTOR, COPY_IN, COPY_OUT, EVERY = "PIPE_S", "PIPE_V", "PIPE_MTE2", "PIPE_MTE3", "PIPE_ALL"
PIPES = (SCALAR, VECTOR, COPY_IN, COPY_OUT)
Clock = dict[str, int]


class Pipes:
    """The clocks of one core.

    Attributes:
        count: the operations that each pipe was given.
    """

    def __init__(self) -> None:
        self.count: Clock = dict.fromkeys(PIPES, 0)
        self._clock: dict[str, Clock] = {pipe: {} for pipe in PIPES}
        self._flags: dict[tuple[str, str, object], list[Clock]] = {}

    def start(self, pipe: str) -> Clock:
        """Give a pipe its next operation; what is finished when that starts."""
        self.count[pipe] += 1
        clock = self._issued(pipe)
        if pipe == SCALAR:
            self._clock[SCALAR][SCALAR] = self.count[SCALAR]  # in order
        return clock

    def set_flag(self, source: str, target: str, event: object) -> None:
        clock = self._issued(source)
        clock[source] = self.count[source]
        self._flags.setdefault((source, target, event), []).append(clock)

    def wait_flag(self, source: str, target: str, event: object) -> bool:
        """Whether the flag had been set."""
        waiting = self._flags.get((source, target, event))
        if not waiting:
            return False
        _join(self._clock[target], waiting.pop(0))
        return True

    def _issued(self, pipe: str) -> Clock:
        """What is finished when a pipe gets something to do.

        The scalar unit issues everything, so all wait for what it has waited for. Its own accesses of memory may still
        be under way then.
        """
        clock = dict(self._clock[SCALAR])
        if pipe != SCALAR:
            clock.pop(SCALAR, None)
        _join(clock, self._clock[pipe])
        return clock

    def barrier(self, pipe: str) -> None:
        if pipe == EVERY:
            for clock in self._clock.values():
                _join(clock, self.count)
        else:
            self._clock[pipe][pipe] = self.count[pipe]


def _join(clock: Clock, other: Clock) -> None:
    for pipe, count in other.items():
        clock[pipe] = max(clock.get(pipe, 0), count)


_FLAG = re.compile(r"hivm\.hir\.(set_flag|wait_flag)\[<(\w+)>, <(\w+)>, (?:<(EVENT_ID\d+)>|(%\w+))\]")
_BARRIER = re.compile(r"hivm\.hir\.pipe_barrier\[<(\w+)>\]")
_OPERATION = re.compile(r"hivm\.hir\.(load|store|copy|v\w+) ins\(")
_TRIPS = 6


def waiting_loads(text: str) -> int:
    """How many copies of a full chunk into the core wait until every copy out before them has finished.

    Those do not overlap with the work on the chunk before. Where a buffer is used for input and for output in turn, the
    compiler adds such a wait, though every copy has two buffers.

    Args:
        text: the compiler's last IR. Events that alternate with the trips of the loop are taken to be two.
    """
    lines, pipes, found = main_loop(text).splitlines(), Pipes(), 0
    for trip in range(_TRIPS):
        found = 0
        for line in lines:
            if flag := _FLAG.search(line):
                kind, source, target, fixed, alternating = flag.groups()
                event = fixed or (alternating, trip % 2)
                if kind == "set_flag":
                    pipes.set_flag(source, target, event)
                else:
                    pipes.wait_flag(source, target, event)
            elif barrier := _BARRIER.search(line):
                pipes.barrier(barrier[1])
            elif operation := _OPERATION.search(line):
                pipe = {"load": COPY_IN, "store": COPY_OUT}.get(operation[1], VECTOR)
                clock = pipes.start(pipe)
                found += pipe == COPY_IN and clock.get(COPY_OUT, 0) >= pipes.count[COPY_OUT]
            elif "memref.load" in line or "memref.store" in line:
                pipes.start(SCALAR)
    return found
