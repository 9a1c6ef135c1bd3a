"""The GE graphs that our steps really become: through torch.compile and the wheel's own torchair, as in tests/npu.

Needs the environment of scripts/npu_lane.sh. Nothing is executed: GE's run is replaced by nothing, which also shows
how long the Python around it takes.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.kernels import ascend, proof
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel
from npu_fuse_pass.lowerings.npu.kernels.preview import PreviewHardware

Node = tuple[str, int]
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "ExpandDims", "Identity")  # no task: the same memory
_FIRST = 2  # torch.optim's classes have another graph for the step that makes the states
_ROUNDS = 5


class NoTorchNpu(Exception):  # noqa: N818 - says what to run
    """This is not the lane's environment."""


def lane() -> tuple[Any, Any, Any]:
    """tests/npu's harness, interpreter and kernels.

    Raises:
        NoTorchNpu: they cannot be used here.
    """
    folder = str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "npu")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as e:
        raise NoTorchNpu(
            f"the model reads GE graphs that the real torch_npu makes, and here: {type(e).__name__}: {e}\n"
            "Run: bash scripts/bench.sh --model npu"
        ) from e
    harness, interpreter, kernels = map(importlib.import_module, ("harness", "interpreter", "kernels"))
    harness.prepare()
    return harness, interpreter, kernels


def emitted(
    make: Callable[[Any], Any], shapes: Sequence[tuple[int, ...]], adjacent: bool, **options: Any
) -> tuple[list[Node], float]:
    """Compute nodes of a step's GE graph with the bytes that they read and write, and seconds of Python around it.

    The seconds are the least of a few steps on this machine: prelude, binding, torchair's own Python.

    Args:
        make: parameters -> optimizer.
        shapes: of the parameters.
        adjacent: parameters are views of one buffer, and gradients of another, which stays (flatten="params",
            buckets of DDP, Megatron's shards); otherwise all lie apart, and gradients are new at every step.
        options: of the backend.

    Raises:
        NoTorchNpu: torch_npu is missing.
        UnfusedError: something of the step is left unfused.
        RuntimeError: a step is more than one GE graph.
    """
    harness, interpreter, kernels = lane()
    ran: list[tuple[Any, Sequence[Tensor]]] = []

    def nothing(proto: Any, inputs: Sequence[Tensor], assigned: Sequence[Any] = ()) -> list[Any]:
        metas = [t.to("meta") if t.dim() else t for t in inputs]
        ran.append((proto, metas))
        if all(t is not None for t in assigned):
            return list(assigned)
        new = interpreter.evaluate(proto, metas)  # the step that makes the states
        return [torch.empty_like(n, device="cpu") if t is None else t for t, n in zip(assigned, new, strict=True)]

    with harness.record(), mock.patch.object(interpreter, "run", nothing):
        host = _host_seconds(make, shapes, adjacent, before_each=ran.clear, **options)
    if len(ran) != 1:
        raise RuntimeError(f"a step became {len(ran)} GE graphs; the model is of one")
    return nodes_of(*ran[0], interpreter, kernels), host


class _Idle(PreviewHardware):
    """Hardware on which kernels take no time."""

    calls_back = False

    def __init__(self) -> None:
        super().__init__()
        self.chunk = 4096

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        """Nothing."""


def host_of_kernels(make: Callable[[Any], Any], shapes: Sequence[tuple[int, ...]], adjacent: bool) -> float:
    """Seconds of Python around a step that launches generated kernels itself, as `emitted` measures it."""
    lane()
    # nothing really runs, so the cache's note of what ran a group last stays as it is
    with mock.patch.object(ascend, "current", _Idle), mock.patch.object(proof, "changed", return_value=""):
        return _host_seconds(make, shapes, adjacent, kernels="generated")


def _host_seconds(
    make: Callable[[Any], Any],
    shapes: Sequence[tuple[int, ...]],
    adjacent: bool,
    before_each: Callable[[], None] = lambda: None,
    **options: Any,
) -> float:
    """The least of the seconds of a few steps, once all states are made; see `emitted`."""
    torch.compiler.reset()
    params = [torch.nn.Parameter(t) for t in _tensors(shapes, adjacent)]
    gradients = _tensors(shapes, adjacent)
    given = {"platform": "npu", "strict": True, **options}
    step = torch.compile(make(params).step, backend=npu_fused, options=given)
    seconds = []
    for _ in range(_FIRST + _ROUNDS):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g if adjacent else torch.empty_like(g)
        before_each()
        start = time.perf_counter()
        step()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
    return min(seconds[_FIRST:])


def _tensors(shapes: Sequence[tuple[int, ...]], adjacent: bool) -> list[Tensor]:
    """Memory that nobody writes to, apart or in one buffer."""
    if not adjacent:
        return [torch.empty(s) for s in shapes]
    sizes = [torch.Size(s).numel() for s in shapes]
    return [t.view(s) for t, s in zip(torch.empty(sum(sizes)).split(sizes), shapes, strict=True)]


def nodes_of(proto: Any, inputs: Sequence[Tensor], interpreter: Any, kernels: Any) -> list[Node]:
    """Type and bytes of every compute node, by running the interpreter's kernels on meta tensors.

    Every output of a node is written once and every distinct input read once.
    """
    values: dict[str, Tensor] = {}
    found: list[Node] = []
    for op in proto.op:
        names = [name for name in op.input if not name.endswith(":-1")]
        if op.type == "NetOutput":
            break
        if op.type in ("Data", "RefData"):
            outputs = [inputs[op.attr["index"].i]]
        elif op.type == "Const":
            outputs = [interpreter.constant(op)]
        else:
            read = {name: values[name] for name in names if name}
            outputs = kernels.KERNELS[op.type](interpreter.Node(op, [read.get(name) for name in names]))
            if op.type not in _VIEWS:
                found.append((op.type, sum(t.numel() * t.itemsize for t in [*read.values(), *outputs])))
        values.update({f"{op.name}:{i}": output for i, output in enumerate(outputs)})
    return found
