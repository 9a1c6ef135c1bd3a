"""Generated kernels as one GE node, by torchair's public converters.

A node has one form for every formula: tensors that it writes, tensors that it only reads, the step's numbers, and the
name of its launcher. Its outputs have the names of the inputs that they replace, which GE takes as writing in place. GE
calls back when it runs the node (`call`).
"""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import GraphRefused
from npu_fuse_pass.lowerings.npu.fakes import FakeTensor, no_dispatch
from npu_fuse_pass.lowerings.npu.graph import names
from npu_fuse_pass.lowerings.npu.kernels import ascend
from npu_fuse_pass.lowerings.npu.kernels.launch import Cluster

TYPE = "NpuFuseGenerated"
_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define("generated(Tensor[] written, Tensor[] read, Tensor numbers, str kernel) -> Tensor[]")
generated_update = torch.ops.npu_fused.generated.default
"""New values of `written`."""

_clusters: weakref.WeakValueDictionary[str, Cluster] = weakref.WeakValueDictionary()
_serial = itertools.count()


def known(cluster: Cluster) -> str:
    """Register a node's launcher and return the name by which `call` finds it.

    The reference is weak: the caller keeps `cluster`.
    """
    name = f"{cluster.name}.{next(_serial)}"
    _clusters[name] = cluster
    return name


def call(kernel: str, written: Sequence[int], read: Sequence[int], numbers: int) -> None:
    """Launch a node's kernels on the current stream: GE's callback when it runs the node.

    Args:
        kernel: the node's attribute of that name.
        written: addresses of the node's tensors that are written in place.
        read: addresses of those that are only read.
        numbers: the address of the numbers, on the device.
    """
    _clusters[kernel](written, read, numbers)


def _fake(written: list[FakeTensor], read: list[FakeTensor], numbers: Tensor, kernel: str) -> list[Tensor]:
    """Fake results without the dispatcher, which would ask for a device that is not there."""
    with no_dispatch():
        return [FakeTensor(t.fake_mode, torch.empty(t.shape, dtype=t.dtype, device="meta"), t.device) for t in written]


torch.library.register_fake("npu_fused::generated", _fake, lib=_library)


def register(torchair: Any) -> None:
    """Give torchair the node's converter.

    The node's name is added to torchair's module of GE operations, too: for a missing operation torchair infers shapes
    by running it on new tensors of the arguments' sizes, on their device.
    """
    from torchair._ge_concrete_graph import compat_ir, ge_apis

    if not hasattr(ge_apis, TYPE):
        setattr(ge_apis, TYPE, functools.partial(compat_ir.ge_op, TYPE))
    if not hasattr(generated_update, "_ge_converter"):
        torchair.register_fx_node_ge_converter(generated_update)(names.naming(_convert))


def _convert(written: list[Any], read: list[Any], numbers: Any, kernel: str, meta_outputs: Any = None) -> list[Any]:
    from torchair._ge_concrete_graph.compat_ir import ge_op
    from torchair.ge import attr

    made = ge_op(
        op_type=TYPE,
        inputs={"written": written, "read": read, "numbers": numbers},
        outputs=[("written", len(written))],
        attrs={"kernel": attr.Str(kernel)},
    )
    return list(made) if isinstance(made, (list, tuple)) else [made]


def serve() -> None:
    """Register the node's callback with GE, if this CANN has callbacks in Python.

    Raises:
        GraphRefused: its interface is unknown.
    """
    if ascend.calls_back():
        try:
            _serve(importlib.import_module("ge.custom_op"), importlib.import_module("ge.runtime"))
        except Exception as e:
            raise GraphRefused(f"GE does not take the callback of generated kernels: {type(e).__name__}: {e}") from e


@functools.cache
def _serve(custom_op: Any, runtime: Any) -> None:
    """Register by GE's interface for custom operations in Python. Never run on an NPU."""
    described: Any = runtime.TensorDesc
    many = list.__class_getitem__(described)

    def shapes(written: Any, read: Any, numbers: Any, *, kernel: str) -> Any:
        return written

    shapes.__annotations__ = {"written": many, "read": many, "numbers": described, "kernel": str, "return": many}
    custom_op.register_op(op_type=TYPE, mutates_args=("written",))(shapes)

    class Generated:
        def execute(self, written: Any, read: Any, numbers: Any, *, kernel: str) -> None:
            context = custom_op.get_execute_ctx()
            for k in range(len(written)):
                context.make_output_ref_input(k, k)
            with ascend.on_stream(context.get_stream()):
                call(kernel, [t.addr for t in written], [t.addr for t in read], numbers.addr)

    custom_op.register_op_impl(op_type=TYPE)(Generated)
