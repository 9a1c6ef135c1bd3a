"""Matching by mathematics: which kernel computes an update, however it is written, and with which scalars."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import optimizers
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.ir.fused_op import evaluate
from npu_fuse_pass.ir.types import Captured, Formula, Group
from npu_fuse_pass.match.find import match_group
from npu_fuse_pass.match.known_kernels import KERNELS
from npu_fuse_pass.match.result import Match, NoMatch
from tests.support import graphs
from tests.support.graphs import with_groups
from tests.support.near_misses import NEAR_MISSES, WHOLE
from tests.support.spellings import STEPS, VALUES, Spelling
from tests.support.spellings_more import SPELLINGS
from tests.support.training import gradients, parameters, set_gradients


def over(spellings: list[Spelling]) -> pytest.MarkDecorator:
    cases = [(s, mode) for s in spellings for mode in s.modes]
    return pytest.mark.parametrize(("spelling", "mode"), cases, ids=[f"{s.name}-{mode}" for s, mode in cases])


def wanted_scalars(spelling: Spelling) -> dict[str, float]:
    """What the kernel's scalars are for VALUES, at the next step."""
    t, beta1, beta2 = STEPS + 1, VALUES["b1"], VALUES["b2"]
    shift = -1 if spelling.kernel == "adamw" else 0
    scaled = spelling.name != "epsilon as it is beside the root" and spelling.kernel.startswith("adam_")
    rms = "rmsprop" in spelling.kernel
    return {
        "lr": VALUES["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "beta1_power": beta1 ** (t + shift),
        "beta2_power": beta2 ** (t + shift),
        "epsilon": VALUES["eps"] * ((1 - beta2**t) ** 0.5 if scaled else 1),
        "weight_decay": VALUES["wd"] if spelling.decay == "decoupled" else 0.0,
        "momentum": beta1,
        "rho": beta2 if rms else 0.0,
    }


def leaf_values(
    captured: Captured, group: Group, arguments: list[Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What the slots of the only member hold: tensors, scalars."""
    (member,) = group.members
    found = {}
    for slot, index in enumerate(member):
        leaf = captured.leaves[index]
        value = arguments[leaf.index] if leaf.kind == "input" else torch.tensor(leaf.value, dtype=torch.float64)
        found[slot] = value.clone()
    tensors = {s: v for s, v in found.items() if group.formula.slots[s].tensor}
    return tensors, {s: v for s, v in found.items() if s not in tensors}


def argument_values(found: Match, tensors: dict[int, Tensor], scalars: dict[int, Tensor]) -> dict[str, Tensor]:
    """The values of a match's scalars for one member; with its tensors those of the inputs, too."""
    chosen = {**(found.inputs if tensors else {}), **found.scalars}
    numbers = {slot: torch.tensor(value, dtype=torch.float64) for slot, value in found.constants.items()}
    values = evaluate(Formula(found.slots, (), tuple(chosen.values()), ""), tensors, {**scalars, **numbers})
    return {name: values[id(e)] for name, e in chosen.items()}


def apart(got: Tensor, want: Tensor, *read: Tensor) -> float:
    """Relative to the largest value that is read or written."""
    got, want = got.double(), want.double()
    scale = torch.stack([x.double().abs() for x in (want, *read)]).amax(0)
    return float(((got - want).abs() / (1e-3 + scale)).max())


@over([*SPELLINGS, WHOLE])
def test_spellings(spelling: Spelling, mode: str) -> None:
    """The kernel, its scalars, the roles of the slots, and that it computes the same in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        captured, only = spelling.group(mode, dtype)
        found = match_group(only, captured.leaves)
        assert isinstance(found, Match), found
        assert found.kernel.name == spelling.kernel
        before = spelling.arguments(mode, dtype)
        given = argument_values(found, *leaf_values(captured, only, before))
        for name, value in wanted_scalars(spelling).items():
            if name in found.kernel.scalars:
                assert float(given[name]) == pytest.approx(value, rel=1e-9, abs=1e-15), name
        after = [x.clone() for x in before]
        spelling.function(mode)(*after)
        scalars = {name: given[name].to(dtype) for name in found.kernel.scalars}
        results = found.kernel.function(*(given[name] for name in found.kernel.inputs), **scalars)
        for name, result in zip(found.kernel.outputs, results, strict=True):
            leaf = captured.leaves[only.members[0][found.outputs[name]]]
            error = apart(result, after[leaf.index], before[leaf.index], before[1])
            assert error <= max(found.tolerance, 1e-14 if dtype == torch.float64 else 0), (name, error)


def test_there_are_enough_spellings() -> None:
    assert sum(s.kernel == "adamw" for s in SPELLINGS) >= 20
    assert {s.kernel for s in SPELLINGS} == {k.name for k in KERNELS}
    assert len({s.name for s in SPELLINGS}) == len(SPELLINGS)


@over(NEAR_MISSES)
def test_near_misses(spelling: Spelling, mode: str) -> None:
    found = spelling.found(mode)
    assert isinstance(found, NoMatch), (found.kernel.name, found.readable(spelling.group(mode)[1].labels))
    assert found.reason


def test_there_are_enough_near_misses() -> None:
    assert len({s.name for s in NEAR_MISSES}) == len(NEAR_MISSES) >= 20


# Real optimizers ------------------------------------------------------------------------------------------------------

STOCK: list[tuple[Any, dict[str, Any], str]] = [
    (torch.optim.Adam, dict(), "adamw"),
    (torch.optim.Adam, dict(weight_decay=0.1), "adamw"),
    (torch.optim.Adam, dict(maximize=True, weight_decay=0.1), "adamw"),
    (torch.optim.Adam, dict(capturable=True, tensor_lr=True), "adamw"),
    (torch.optim.Adam, dict(amsgrad=True, weight_decay=0.1), "adam_amsgrad"),
    (torch.optim.AdamW, dict(weight_decay=0.1), "adamw"),
    (torch.optim.AdamW, dict(weight_decay=0.1, capturable=True, tensor_lr=True), "adamw"),
    (torch.optim.AdamW, dict(weight_decay=0.1, amsgrad=True), "adam_amsgrad"),
    (torch.optim.SGD, dict(momentum=0.9), "momentum"),
    (torch.optim.SGD, dict(momentum=0.9, dampening=0.3, weight_decay=0.1), "momentum"),
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1), "nesterov"),
    (torch.optim.SGD, dict(), ""),
    (torch.optim.RMSprop, dict(momentum=0.9), ""),
    (torch.optim.NAdam, dict(), ""),
    (torch.optim.RAdam, dict(), ""),
    (torch.optim.Adagrad, dict(), ""),
    (torch.optim.Adamax, dict(), ""),
    (torch.optim.Adadelta, dict(), ""),
]


def captured_step(opt: Any) -> tuple[Captured, list[Group]]:
    """What Dynamo gives for the second step of a stock optimizer, through the first two stages."""
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    steps: list[Captured] = []

    def backend(gm: Any, inputs: Any) -> Any:
        steps.append(capture(gm))
        return gm.forward

    step = torch.compile(opt.step, backend=backend)
    for seed in range(2):
        params = opt.param_groups[0]["params"]
        set_gradients(params, gradients(params, seed))
        step()
    assert not steps[-1].unfused, steps[-1].unfused
    return with_groups(steps[-1])


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize(
    ("cls", "options", "kernel"), STOCK, ids=lambda x: getattr(x, "__name__", getattr(x, "name", str(x)))
)
def test_stock(cls: Any, options: dict[str, Any], kernel: str, foreach: bool) -> None:
    options = {**dict(lr=0.02), **options}
    tensor_lr = options.pop("tensor_lr", False)
    lr = torch.tensor(options["lr"]) if tensor_lr else options["lr"]
    captured, (only,) = captured_step(cls(parameters([(3, 4), (5,)]), **{**options, "lr": lr, "foreach": foreach}))
    found = match_group(only, captured.leaves)
    assert (found.kernel.name if isinstance(found, Match) else "") == kernel, found
    if not isinstance(found, Match):
        return
    numbers = {
        s: STEPS if captured.leaves[i].kind == "attribute" else captured.leaves[i].value
        for s, i in enumerate(only.members[0])
        if s in only.formula.scalar_slots
    }
    numbers |= {s: 0.02 for s, i in enumerate(only.members[0]) if captured.leaves[i].kind == "input" and s in numbers}
    given = argument_values(found, {}, {s: torch.tensor(x, dtype=torch.float64) for s, x in numbers.items()})
    beta1, beta2, t = 0.9, 0.999, STEPS + (0 if kernel == "adamw" else 1)
    eps = 1e-8 * (1 if kernel == "adamw" else (1 - beta2**t) ** 0.5)
    decoupled = cls is torch.optim.AdamW and kernel == "adamw"
    want = dict(lr=0.02, momentum=0.9, beta1=beta1, beta2=beta2, beta1_power=beta1**t, beta2_power=beta2**t)
    want |= dict(epsilon=eps, weight_decay=0.1 if decoupled else 0.0)
    for name, value in given.items():
        assert float(value) == pytest.approx(want[name], rel=1e-9), name
    expected = {"grad"} if options.get("maximize") or options.get("dampening") else set()
    expected |= {"grad"} if options.get("weight_decay") and cls is not torch.optim.AdamW else set()
    expected |= {"var"} if cls is torch.optim.AdamW and options.get("amsgrad") else set()
    assert set(found.prepared) == expected


RULES: list[tuple[Any, dict[str, Any], str]] = [
    (optimizers.NpuFusedAdam, dict(lr=0.02), "adamw"),
    (optimizers.NpuFusedAdam, dict(lr=0.02, amsgrad=True), "adam_amsgrad"),
    (optimizers.NpuFusedAdamW, dict(lr=0.02), "adamw"),
    (optimizers.NpuFusedAdamW, dict(lr=0.02, amsgrad=True), "adam_amsgrad"),
    (optimizers.NpuFusedSGD, dict(lr=0.02, momentum=0.9), "momentum"),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9), "rmsprop"),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, centered=True), "centered_rmsprop"),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, decoupled_decay=True), "rmsprop"),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, lr_in_momentum=False), ""),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02), ""),
    (optimizers.NpuFusedLamb, dict(lr=0.02), ""),
    (optimizers.lion, dict(lr=0.02), ""),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "options", "kernel"), RULES, ids=lambda x: getattr(x, "__name__", getattr(x, "name", str(x)))
)
def test_rules(make: Any, options: dict[str, Any], kernel: str, dtype: torch.dtype) -> None:
    """Ours, with half-precision parameters too: casts are transparent, and the tolerance says so."""
    params = parameters([(3, 4), (5,)], dtype)
    opt = make(params, **options)
    set_gradients(params, gradients(params, 0))
    opt.step()
    captured, (only,) = with_groups(graphs.captured_step(opt))
    found = match_group(only, captured.leaves)
    assert (found.kernel.name if isinstance(found, Match) else "") == kernel, found
    if isinstance(found, Match):
        assert found.tolerance == {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
        text = found.readable(only.labels)
        assert text["lr"] == "lr"
        assert "param" not in "".join(text[name] for name in text.keys() - {"grad", "var"})
