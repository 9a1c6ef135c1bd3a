"""A model of an optimizer step's time on an NPU: pure arithmetic over launches and bytes. No number here was measured.

    t = max(launches · t_enqueue + t_host, Σ over tasks of max(t_task, bytes / (share · bandwidth))) + head

The host enqueues while the device works, so the slower of the two decides. An eager operation is one launch and one
task. A static GE graph is one launch, one task for each compute node, and a head. What the model leaves out: the
caches of a chip, tasks that overlap, what GE fuses or copies by itself, and the Python between eager operations.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number with its source; an assumed one has a range, over which a comparison has to hold.

    Attributes:
        value: in SI units.
        low, high: the range; None where the number is somebody's measurement or specification.
    """

    value: float
    source: str
    low: float | None = None
    high: float | None = None


CONSTANTS: dict[str, Constant] = {
    "bandwidth": Constant(1.6e12, "Atlas A2's HBM, bytes/s: CANN's operator development guide, the one source"),
    "enqueue": Constant(12.1e-6, "host, one eager operation, 910B2: triton-ascend issue 1675 (Triton: 8.6 to 23.7 us)"),
    "share": Constant(0.8, "of the bandwidth that elementwise work reaches: assumed, alike for all", 0.6, 0.95),
    "task": Constant(2e-6, "shortest task on the device: assumed", 1e-6, 5e-6),
    "head": Constant(30e-6, "starting a static GE graph beyond one enqueue: assumed", 10e-6, 100e-6),
}
Values = Mapping[str, float]


def nominal() -> dict[str, float]:
    """All constants at their values."""
    return {name: c.value for name, c in CONSTANTS.items()}


def corners() -> Iterator[dict[str, float]]:
    """Every combination of the ends of what is assumed."""
    assumed = {name: (c.low, c.high) for name, c in CONSTANTS.items() if c.low is not None and c.high is not None}
    for ends in itertools.product(*assumed.values()):
        yield nominal() | dict(zip(assumed, ends, strict=True))


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step of a contestant does.

    Attributes:
        tasks: bytes that a task on the device reads and writes -> how many such tasks.
        launches: of the host.
        graph: they are one static graph.
        syncs: times that the host waits for the device; shown, not modelled.
        host: seconds of Python around a graph's one launch.
    """

    tasks: Mapping[int, int]
    launches: int
    graph: bool = False
    syncs: int = 0
    host: float = 0.0

    @property
    def nodes(self) -> int:
        return sum(self.tasks.values())

    @property
    def moved(self) -> int:
        """Bytes."""
        return sum(size * count for size, count in self.tasks.items())


def eager(sizes: Iterable[int], syncs: int = 0) -> Work:
    """Operations one by one; `sizes` are their bytes."""
    tasks = collections.Counter(sizes)
    return Work(tasks, tasks.total(), syncs=syncs)


def static_graph(sizes: Iterable[int], host: float = 0.0) -> Work:
    """One GE graph; `sizes` are its compute nodes' bytes."""
    return Work(collections.Counter(sizes), 1, graph=True, host=host)


def device_seconds(work: Work, c: Values) -> float:
    """All tasks, one after another."""
    return sum(n * max(c["task"], size / (c["share"] * c["bandwidth"])) for size, n in work.tasks.items())


def host_seconds(work: Work, c: Values) -> float:
    """Until the last task is enqueued."""
    return work.launches * c["enqueue"] + work.host


def seconds(work: Work, c: Values) -> float:
    """A step, modelled."""
    return max(host_seconds(work, c), device_seconds(work, c)) + (c["head"] if work.graph else 0.0)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Ours against the best peer.

    Attributes:
        peer: who that is.
        ratio: its time over ours.
        worst: the smallest such ratio over the ranges of what is assumed, with the best peer of each.
        why: what decides where ours is slower; "" where it is not.
    """

    peer: str
    ratio: float
    worst: float
    why: str


def compare(ours: Work, peers: Mapping[str, Work]) -> Verdict:
    """How ours stands."""
    c = nominal()
    peer = min(peers, key=lambda name: seconds(peers[name], c))
    worst = min(min(seconds(w, k) for w in peers.values()) / seconds(ours, k) for k in corners())
    ratio = seconds(peers[peer], c) / seconds(ours, c)
    return Verdict(peer, ratio, worst, "" if ratio >= 1 else _why(ours, peers[peer], c))


def _why(ours: Work, peer: Work, c: Values) -> str:
    """What alone takes us longer than the peer's whole step."""
    limit = seconds(peer, c)
    shortest = ours.nodes * c["task"]
    memory = ours.moved / (c["share"] * c["bandwidth"])
    reasons: Sequence[tuple[bool, str]] = [
        (ours.host > limit, f"Python before the launch takes {1e6 * ours.host:.0f} us"),
        (shortest > limit, f"{ours.nodes} nodes of at least {1e6 * c['task']:.0f} us each"),
        (
            memory > limit and ours.moved > 1.01 * peer.moved,
            f"{ours.moved / 1e6:.0f} MB, the peer moves {peer.moved / 1e6:.0f} MB",
        ),
    ]
    found = [text for holds, text in reasons if holds]
    if not found and max(host_seconds(ours, c), device_seconds(ours, c)) > limit:
        found = [
            f"{ours.nodes} nodes with {ours.moved / 1e6:.0f} MB, the peer has {peer.nodes} with {peer.moved / 1e6:.0f}"
        ]
    return "; ".join(found) or f"the graph's head of {1e6 * c['head']:.0f} us decides"
