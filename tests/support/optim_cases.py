"""Every optimizer of torch's own test database with each of its inputs, written and compiled in every way.

A case is one optimizer input × foreach or loop × how the step is called:
- method: `torch.compile(opt.step)`;
- unwrapped: the plain function below torch's wrappers (their graph breaks), with `fullgraph=True`, as torch's tests do;
- closure: the method with a closure that computes a loss and gradients.

`differentiable=True` is left out, as in torch's tests of compiled optimizers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch.testing._internal.common_optimizers import optim_db

import npu_fuse_pass
from tests.support.training import FULL, gradients, parameters

STEPS = 8
SHAPES = ((4, 3), (33,), (2, 3, 5), (4, 3))
MATRICES = ((4, 3), (17, 2), (4, 3), (8, 8))
FORMS = ("method", "unwrapped", "closure")  # the first without a closure
INFOS: dict[str, Any] = {info.name: info for info in optim_db}
PARTLY = ("Muon", "Adafactor")  # matrix products and reductions over rows stay as they are

# what no backend is shown: (optimizer, implementation, form) with * for any, and why
NOT_SHOWN = {
    ("*", "fused", "method"): "torch's fused kernels are hidden from Dynamo: the graph is empty",
    ("*", "fused", "closure"): "torch's fused kernels are hidden from Dynamo: the graph is empty",
    ("*", "fused", "unwrapped"): "fullgraph=True: Dynamo refuses torch's fused kernels",
    ("LBFGS", "*", "closure"): "Dynamo does not look into LBFGS.step, which decides by the loss's value",
    ("LBFGS", "*", "unwrapped"): "fullgraph=True: Dynamo refuses the closure's backward()",
    ("SparseAdam", "*", "method"): "Dynamo does not look into SparseAdam.step",
    ("SparseAdam", "*", "closure"): "Dynamo does not look into SparseAdam.step",
    ("SparseAdam", "*", "unwrapped"): "fullgraph=True: Dynamo refuses sparse gradients",
    ("Adafactor", "*", "method"): "step.item() breaks every graph before it writes anything",
    ("Adafactor", "*", "closure"): "step.item() breaks every graph before it writes anything",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to compile one optimizer with one input of the database.

    Attributes:
        kwargs: of the optimizer that is compiled.
        eager: of its eager twin: `capturable=True` works on accelerators only, except in a compiled step.
    """

    name: str
    input: str
    kwargs: dict[str, Any]
    eager: dict[str, Any]
    implementation: str
    form: str

    def __str__(self) -> str:
        return f"{self.name}-{self.input}-{self.implementation}-{self.form}"

    @property
    def not_shown(self) -> str | None:
        """Why no backend is shown this case, or None."""
        keys = ((n, i, self.form) for n in (self.name, "*") for i in (self.implementation, "*"))
        return next((NOT_SHOWN[k] for k in keys if k in NOT_SHOWN), None)

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return MATRICES if self.name in PARTLY else SHAPES

    def build(self, eager: bool = False) -> tuple[list[torch.nn.Parameter], Any]:
        """New parameters and an optimizer of them."""
        flags = {} if self.implementation == "single" else {"foreach": self.implementation == "foreach"}
        flags = {"fused": True} if self.implementation == "fused" else flags
        params = parameters(self.shapes)
        kwargs = copy.deepcopy(self.eager if eager else self.kwargs)
        return params, INFOS[self.name].optim_cls(params, **kwargs, **flags)


def _cases() -> Iterator[Case]:
    for info in optim_db:
        implementations = ["foreach", "loop"] if "foreach" in info.supported_impls else ["single"]
        implementations += ["fused"] if "cpu" in info.supports_fused_on else []
        plain = info.optim_inputs_func(device="cpu")
        capturable = [x for x in info.optim_inputs_func(device="cuda") if x.kwargs.get("capturable")]
        for number, given in enumerate([*plain, *capturable]):
            eager = _without_capturable(given.kwargs) if number >= len(plain) else given.kwargs
            for implementation in implementations:
                if implementation == "fused" and number >= len(plain):
                    continue
                for form in FORMS[info.step_requires_closure :]:
                    label = f"{number}:{given.desc}".replace(" ", "_").replace(",", "")
                    yield Case(info.name, label, given.kwargs, eager, implementation, form)


def _without_capturable(kwargs: dict[str, Any]) -> dict[str, Any]:
    def number(x: Any) -> Any:
        return tuple(map(number, x)) if isinstance(x, tuple) else float(x) if isinstance(x, Tensor) else x

    return {k: number(v) for k, v in kwargs.items() if k != "capturable"}


CASES = list(_cases())
SHOWN = [case for case in CASES if case.not_shown is None]
HIDDEN = [case for case in CASES if case.not_shown is not None]


# Running a case -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Graph:
    """A graph that a backend was shown: whether it writes anything, what was reported, how often it ran."""

    calls: int
    writes: bool
    reports: list[Any]
    runs: int = 0


@dataclasses.dataclass
class Result:
    """What training gave: parameters, their states, losses, and the graphs that the backend was shown."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    losses: list[Tensor]
    graphs: list[Graph]

    @property
    def steps(self) -> list[Graph]:
        """Graphs that write: optimizer steps. Others are a closure's forward pass, or empty."""
        return [graph for graph in self.graphs if graph.writes]


class Recorder:
    """A backend that remembers the graphs that it hands on to another one, and counts their runs."""

    def __init__(self, backend: Any) -> None:
        self.backend = lookup_backend(backend) if isinstance(backend, str) else backend
        self.graphs: list[Graph] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
        graph = Graph(len(calls), any(map(_writes, calls)), [])
        self.graphs.append(graph)
        before = len(npu_fuse_pass.reports())
        compiled = self.backend(gm, inputs)
        graph.reports = npu_fuse_pass.reports()[before:]

        def run(*args: Any) -> Any:
            graph.runs += 1
            return compiled(*args)

        return run


def _writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments: `add_`, `_foreach_add_`, `+=`, `out=`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = getattr(node.target, "__module__", "") == "_operator" and name in ("iadd", "isub", "imul", "itruediv")
    return in_place or "out" in node.kwargs or (name.endswith("_") and not name.endswith("__"))


def run(
    case: Case,
    backend: Any,
    prepare: Callable[..., None] | None = None,
    steps: int = STEPS,
    compiled: Callable[[Any], Callable[..., Any]] | None = None,
) -> Result:
    """Train, with another lr at every step; `prepare(params, opt, seed)` runs before each. Backend None is eager.

    `compiled` makes a step of an optimizer in another way; then the backend has no say.
    """
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    recorder = Recorder(backend)
    params, opt = case.build(eager=backend is None)
    step = opt.step if backend is None else compiled(opt) if compiled else _compiled(case, opt, recorder)
    losses = []
    for seed in range(steps):
        _set_rate(case, opt, 1 + seed % 3)
        grads = gradients(params, seed)
        for p, g in zip(params, grads, strict=True):
            p.grad = _gradient(case, g)
        if prepare is not None:
            prepare(params, opt, seed)
        if case.form == "closure" or INFOS[case.name].step_requires_closure:
            losses.append(step(_closure(case, opt, params, grads)))
        else:
            step()
    states = [opt.state[p] for p in params]
    return Result([p.detach() for p in params], states, losses, recorder.graphs)


def _compiled(case: Case, opt: Any, backend: Any) -> Callable[..., Any]:
    if case.form != "unwrapped":
        return torch.compile(opt.step, backend=backend)
    plain = type(opt).step.__wrapped__.__wrapped__
    return torch.no_grad()(torch.compile(lambda *closure: plain(opt, *closure), backend=backend, fullgraph=True))


def _set_rate(case: Case, opt: Any, factor: float) -> None:
    rate = factor * float(case.kwargs.get("lr", opt.defaults["lr"]))
    for group in opt.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _gradient(case: Case, g: Tensor) -> Tensor:
    return g.to_sparse() if INFOS[case.name].only_supports_sparse_grads else g


def _closure(case: Case, opt: Any, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        terms = [(p * g).sum() for p, g in zip(params, grads, strict=True)]
        if INFOS[case.name].step_requires_closure:  # LBFGS searches for a minimum: there has to be one
            terms += [(p * p).sum() for p in params]
        loss = torch.stack(terms).sum()
        loss.backward()
        for p in params:
            assert p.grad is not None
            p.grad = _gradient(case, p.grad)
        return loss

    return closure


def summary(outcomes: dict[str, list[str]]) -> list[str]:
    """Lines on what a run met, from the names of tests by outcome."""

    def count(test: str) -> str:
        found = {outcome: sum(f"::{test}[" in name for name in names) for outcome, names in outcomes.items()}
        return ", ".join(f"{n} {outcome}" for outcome, n in found.items() if n) or "none ran"

    which = "all ran" if FULL else "every sixth ran (all with bash scripts/test.sh --slow)"
    lines = [
        f"{len(CASES)} cases = {len(INFOS)} optimizers x inputs x (foreach, loop, fused) x {FORMS}; {which}",
        f"shown to the backend, {len(SHOWN)}: {count('test_case')}",
        f"not shown, {len(HIDDEN)}: {count('test_not_shown')}",
    ]
    hidden: dict[str, list[str]] = {}
    for (name, implementation, form), reason in NOT_SHOWN.items():
        hidden.setdefault(reason, []).append(" ".join(x for x in (name, implementation, form) if x != "*"))
    return lines + [f"    {', '.join(cases)}: {reason}" for reason, cases in hidden.items()]
