"""A group's generated kernels as one GE node, by torchair's public converters.

The node's inputs are the tensors of each slot, then the numbers; its outputs have the names of the inputs that they
replace, which for GE is memory that is written in place. A callback finds the kernels by their name and launches them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.lowerings.npu.graph.graph import device_write
from npu_fuse_pass.lowerings.npu.kernels.launch import Generated
from npu_fuse_pass.reasons import Code

TYPE = "NpuFuseGenerated"
_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define("generated(Tensor[] tensors, Tensor numbers, int members, int[] written, str kernel) -> Tensor[]")
generated_update = torch.ops.npu_fused.generated.default
"""New values of the written slots of a group; `tensors` and the result are slot-major, `numbers` a row per member."""


def _fake(tensors: list[FakeTensor], numbers: Tensor, members: int, written: list[int], kernel: str) -> list[Tensor]:
    """Not through the dispatcher: that would ask a device which is not there."""
    given = [t for s in written for t in tensors[s * members : (s + 1) * members]]
    with no_dispatch():
        return [FakeTensor(t.fake_mode, torch.empty(t.shape, dtype=t.dtype, device="meta"), t.device) for t in given]


torch.library.register_fake("npu_fused::generated", _fake, lib=_library)


def register(torchair: Any) -> None:
    """Give torchair the node's converter.

    Its module of GE operations gets the node's name, too: for an operation that is not there torchair infers shapes by
    running it on new tensors of the arguments' sizes, on their device.
    """
    from torchair._ge_concrete_graph import compat_ir, ge_apis

    if not hasattr(ge_apis, TYPE):
        setattr(ge_apis, TYPE, functools.partial(compat_ir.ge_op, TYPE))
    if not hasattr(generated_update, "_ge_converter"):
        torchair.register_fx_node_ge_converter(generated_update)(_convert)


def _convert(
    tensors: list[Any], numbers: Any, members: int, written: list[int], kernel: str, meta_outputs: Any = None
) -> list[Any]:
    from torchair._ge_concrete_graph.compat_ir import ge_op
    from torchair.ge import attr

    slots = {f"slot{k}": tensors[k * members : (k + 1) * members] for k in range(len(tensors) // members)}
    made = ge_op(
        op_type=TYPE,
        inputs={**slots, "numbers": numbers},
        outputs=[(f"slot{s}", members) for s in written],
        attrs={"kernel": attr.Str(kernel), "members": attr.Int(members)},
    )
    results = made if isinstance(made, (list, tuple)) else [made]
    return [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]


def graph(generated: Generated, sizes: Sequence[int], device: torch.device, mode: FakeTensorMode) -> fx.GraphModule:
    """The functional graph of one group for torchair: tensors of one dimension slot by slot, then the numbers.

    Args:
        sizes: the elements of each member's tensors.

    Raises:
        Unsupported: the group adds to totals, which others may read: that is more than one node.
    """
    made, members = generated.made, len(sizes)
    if generated.group.formula.contributions or made.device_slots:
        raise Unsupported(generated.group.name, "totals are added up between nodes", Code.ACROSS_PARAMETERS)
    built = fx.Graph()

    def given(name: str, shape: tuple[int, ...], dtype: torch.dtype, on: torch.device) -> fx.Node:
        node = built.placeholder(name)
        node.meta["val"] = FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), on)
        return node

    dtypes = [made.device.slots[s].dtype for s in generated.kernels.slots]
    tensors = [
        given(f"slot{k}_{m}", (n,), dtype, device) for k, dtype in enumerate(dtypes) for m, n in enumerate(sizes)
    ]
    numbers = given("numbers", (members, len(made.values)), torch.float32, torch.device("cpu"))
    written = [generated.kernels.slots.index(s) for s, _ in made.device.writes]
    node = built.call_function(generated_update, (tensors, numbers, members, written, generated.group.name))
    node.name = generated.group.name
    targets = [tensors[s * members + m] for s in written for m in range(members)]
    built.call_function(device_write, (targets, node))
    built.output(())
    return fx.GraphModule(torch.nn.Module(), built, "NpuGeneratedStep")
