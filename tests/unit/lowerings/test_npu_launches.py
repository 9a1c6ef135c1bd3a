"""What a node of generated kernels sends to the device between two steps, on "meta" tensors; launches are noted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.lowerings.npu.host.host import Host
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel
from npu_fuse_pass.lowerings.npu.kernels.launch import Cluster, generate_group
from npu_fuse_pass.lowerings.npu.lowered_group import LoweredGroup
from npu_fuse_pass.passes.group import group
from optimizers import NpuFusedAdam, NpuFusedLamb
from tests.support.graphs import captured_step, traced

DEVICE = torch.device("meta")


class Transfers(TorchDispatchMode):
    """The elements of every copy from the host to the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t.device for t in tree_leaves(args) if isinstance(t, Tensor)]
        if isinstance(out, Tensor) and out.device == DEVICE and torch.device("cpu") in given and out.numel():
            self.sent.append(out.numel())
        return out


@pytest.mark.parametrize(
    ("optimizer", "options", "zeroed"),
    [(NpuFusedAdam, {}, 0), (NpuFusedLamb, {}, 0), (NpuFusedLamb, {"use_global_grad_norm": True}, 1)],
    ids=["adam", "lamb", "lamb_global"],
)
def test_terms_are_zeroed_where_other_members_take_part(optimizer: Any, options: dict[str, Any], zeroed: int) -> None:
    """A transfer of tables wherever an address has changed; one more, of zeros, only where members add to totals."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 2049)]
    for p in params:
        p.grad = torch.ones_like(p)
    grouped = group(captured_step(optimizer(params, lr=0.1, **options)))
    made = [generate_group(g, grouped.leaves, lambda _: 1024) for g in grouped.groups]
    launched: list[str] = []

    def launch(kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        launched.append(kernel.name)

    cluster = Cluster("update", made, grouped.leaves, [0] * len(made), launch, DEVICE)
    written, read = ([64 * k for k, _ in enumerate(cluster.leaves(kind))] for kind in (True, False))
    moved = [64 + a for a in read]
    found = []
    for addresses, active in (
        (read, [True, True]),
        (read, [True, True]),
        (moved, [True, True]),
        (moved, [True, False]),
        (read, [True, False]),
        (read, [True, True]),
    ):
        cluster.active = [active]
        with Transfers() as transfers:
            cluster(written, addresses, 0)
        found.append(len(transfers.sent))
    assert found == [1 + zeroed, 0, 1, 1 + zeroed, 1, 1 + zeroed]
    assert len(launched) == 6 * len(made[0].kernels.launches)


def test_states_that_follow_from_tensors_stay_on_the_device() -> None:
    """The host reads none of them; they are one address for each member in its row, and written last."""

    def step(count: Any, *given: Any) -> None:
        count.add_(1)
        for p, g, v in zip(given[:2], given[2:4], given[4:], strict=True):
            v.copy_(0.9 * v + (g * g).sum())
            p.sub_(g / (v.sqrt() + 1) / count)

    tensors = [torch.ones(5), torch.ones(2049)]
    examples = [torch.tensor(1.0), *tensors, *tensors, torch.tensor(1.0), torch.tensor(2.0)]
    grouped = group(capture(traced(step, *examples)))
    leaves = [dataclasses.replace(leaf, device=DEVICE) if leaf.name != "a0" else leaf for leaf in grouped.leaves]
    updates = [g for g in grouped.groups if g.formula.tensor_slots]
    made = [generate_group(g, leaves, lambda _: 1024) for g in updates]
    ((first,), (lowered,)) = made, [LoweredGroup(updates[0], leaves, generated=made[0])]
    assert [k.over for k in first.kernels.launches] == ["chunks", "chunks", "members"]
    assert not lowered.device_scalars and "0-dim" not in lowered.note
    values: list[Any] = [t.to(DEVICE) if k else t for k, t in enumerate(examples)]
    values += [None] * (len(leaves) - len(values))
    assert Host(leaves, [lowered]).prepare(values, complete=True).active == [[True, True]]  # "meta" cannot be read

    launched: list[tuple[str, tuple[int, ...]]] = []

    def launch(kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        launched.append((kernel.over, (rows,)))

    cluster = Cluster("update", made, leaves, [0], launch, DEVICE)
    order = [s for _, s, _ in cluster.leaves(written=True)]
    assert order.count(first.made.states[0]) == 2 and first.made.states[0] not in first.made.device.tensor_slots
    written, read = ([64 * (k + 1) for k, _ in enumerate(cluster.leaves(kind))] for kind in (True, False))
    found = []
    for addresses in (written, written, [a + 64 for a in written]):
        with Transfers() as transfers:
            cluster(addresses, read, 0)
        found.append(transfers.sent)
    chunks, width, of_member, members = 4, 2 + len(first.kernels.slots), 3, 2
    table = chunks * width + members * of_member + members
    assert found == [[table], [], [table]]
    assert launched == [("chunks", (4,)), ("chunks", (4,)), ("members", (2,))] * 3
