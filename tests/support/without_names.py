"""Training as on a torch that lacks a private name: `python -m tests.support.without_names NAME,... ...` says how.

The name is taken from this project's own eyes alone, in the text of its modules as they are imported: torch's own code
goes on using it. Every name has a process of its own, a copy of one that has imported torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import pkgutil
import re
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

PACKAGES = ("npu_fuse_pass", "optimizers")


class Hiding(importlib.machinery.PathFinder):
    """Imports the project's modules with another name in the place of one of torch's."""

    def __init__(self, names: Sequence[str]) -> None:
        self._patterns = [pattern for name in names for pattern in _mentions(name)]

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:  # type: ignore[override]
        spec = super().find_spec(fullname, path, target)
        if fullname.partition(".")[0] not in PACKAGES or spec is None or spec.origin is None:
            return None
        patterns = self._patterns

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, name: str) -> types.CodeType:
                text = pathlib.Path(self.path).read_text(encoding="utf-8")
                for pattern in patterns:
                    text = re.sub(pattern, r"\g<0>_gone", text)
                return compile(text, self.path, "exec")

        spec.loader = Loader(fullname, spec.origin)
        return spec


def _mentions(name: str) -> list[str]:
    """How a module writes a name, and those below it: in full, in an import, or behind an object of its class."""
    owner, _, last = name.rpartition(".")
    if is_attribute(name):
        return [rf"(?<!\w){last}(?!\w)"]
    return [rf"(?<![\w.]){re.escape(name)}(?!\w)", rf"from {re.escape(owner)} import (\w+, )*{last}(?!\w)"]


def is_attribute(name: str) -> bool:
    """Whether it is a private name of a class, which the project takes from objects."""
    owner, _, last = name.rpartition(".")
    return owner.rpartition(".")[2][:1].isupper() and last.startswith("_")


def import_all() -> None:
    for package in PACKAGES:
        for found in pkgutil.walk_packages([package], f"{package}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)


SHAPES = ((3, 4), (5,), ())


def params() -> list[torch.nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=made)) for s in SHAPES]


def train(given: Sequence[Tensor], step: Callable[[], Any]) -> None:
    made = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in given:
            p.grad = torch.randn(p.shape, generator=made)
        step()


def compared(ours: Sequence[Tensor], step: Callable[[], Any], oracle: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """What training says of itself, and how far it is from torch's own steps."""
    import npu_fuse_pass

    theirs = params()
    train(theirs, oracle(theirs).step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(ours, step)
    report = npu_fuse_pass.reports()[-1] if npu_fuse_pass.reports() else None
    npu_fuse_pass.clear_reports()
    return {
        "error": max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True)),
        "fused": report is not None and not report.reasons and bool(report.groups),
        "groups": 0 if report is None else len(report.groups),
        "codes": [] if report is None else [reason.code.name for reason in report.reasons],
        "said": "\n".join([str(report), *(str(w.message) for w in caught)]).replace("_gone", ""),
    }


def of_ours() -> dict[str, Any]:
    import optimizers

    given, called = params(), []
    opt = optimizers.NpuFusedAdam(given, lr=0.1)
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("behind"))
    found = compared(given, torch.compile(opt.step, backend="npu_fused"), lambda p: torch.optim.Adam(p, lr=0.1))
    assert called == ["before", "behind"] * 3, called
    return found


def of_torch() -> dict[str, Any]:
    import npu_fuse_pass

    given = params()
    step = npu_fuse_pass.compile_step(torch.optim.AdamW(given, lr=0.1))
    return compared(given, step, lambda p: torch.optim.AdamW(p, lr=0.1))


def captured() -> dict[str, Any]:
    import npu_fuse_pass  # noqa: F401

    given = params()
    step = torch.compile(torch.optim.AdamW(given, lr=0.1).step, backend="npu_fused")
    return compared(given, step, lambda p: torch.optim.AdamW(p, lr=0.1))


def in_a_function() -> dict[str, Any]:
    """A step in a function that changes what it reads, and one that it does not."""
    import optimizers

    given = params()
    opt = optimizers.NpuFusedAdam(given, lr=0.3)

    @torch.compile(backend="npu_fused")
    def step() -> None:
        opt.param_groups[0]["lr"] = 0.1
        opt.step()

    return compared(given, step, lambda p: torch.optim.Adam(p, lr=0.1))


class Squared(torch.optim.Optimizer):
    """Its update has an operation that no kernel computes, between some that one does."""

    def __init__(self, given: Any) -> None:
        super().__init__(given, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            grad = p.grad.view(1, -1) * 0.5
            p.add_((grad @ grad.mT).view(()) * p.grad, alpha=-0.1)


def with_another_operation() -> dict[str, Any]:
    import npu_fuse_pass

    given = params()
    return compared(given, npu_fuse_pass.compile_step(Squared(given)), Squared)


def tools() -> None:
    """What lies beside a step: Inductor's hook, folders of dumps, scripts that are watched, numbers."""
    import npu_fuse_pass
    from npu_fuse_pass import private_torch
    from npu_fuse_pass.dump import folder
    from npu_fuse_pass.lowerings.cpu import input_check
    from npu_fuse_pass.rules.optimizer import RuleOptimizer
    from npu_fuse_pass.tensors import memory, sharded
    from npu_fuse_pass.tools import observe

    assert input_check.wait() == (private_torch.find(input_check._HANDLES) is not None)
    a, b = torch.zeros(3), torch.ones(3)
    memory.copy_each([a], [b])
    assert torch.equal(a, b) and memory.materialised(a) and sharded.local(a) is a
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    npu_fuse_pass.fuse_pass(graph)
    assert npu_fuse_pass.fuse_pass.uuid()
    with tempfile.TemporaryDirectory() as there:
        os.environ["TORCH_COMPILE_DEBUG"] = "1"
        assert "torch_compile_debug" in str(folder.wanted(None))
        del os.environ["TORCH_COMPILE_DEBUG"]
        script = pathlib.Path(there, "script.py")
        script.write_text(
            "import torch\np = torch.nn.Parameter(torch.ones(3))\nopt = torch.optim.SGD([p], lr=0.1)\n"
            "for _ in range(9):\n    p.grad = torch.ones(3)\n    opt.step()\n"
        )
        (seen,) = observe.observe(str(script), [], 2)
        assert seen.steps == 2
        opt = torch.optim.SGD([p := torch.nn.Parameter(torch.ones(3))], lr=0.1)
        p.grad = torch.ones(3)
        npu_fuse_pass.compile_step(opt, dump=there)()
        assert list(pathlib.Path(there).rglob("*.txt"))
    assert issubclass(RuleOptimizer, torch.optim.Optimizer)


CASES = (of_ours, of_torch, captured, in_a_function, with_another_operation)


def without(names: Sequence[str]) -> dict[str, Any]:
    """What training says on a torch without these names."""
    sys.meta_path.insert(0, Hiding(names))
    import_all()
    from npu_fuse_pass import private_torch

    found: dict[str, Any] = {}
    for case in CASES:
        torch._dynamo.reset()
        found[case.__name__] = case()
    tools()
    return {"cases": found, "lacking": [line.replace("_gone", "") for line in private_torch.lacking()]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def main(asked: Sequence[str]) -> None:
    """Args: names to take away; those that are taken away together are joined by commas."""
    torch.set_num_threads(1)
    for names in asked:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            try:
                with _quiet():
                    found = without(names.split(","))
            except BaseException:
                found = {"failed": traceback.format_exc()}
            os.write(write, json.dumps(found).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            found = json.loads(answer.read() or '{"failed": "it crashed"}')
        print(json.dumps({"names": names.split(","), **found}), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
