"""`stochastic_rounding`: half-precision parameters that are rounded up or down by chance."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import npu_fuse_pass
import optimizers
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.stochastic import philox, random_bits, rounded, stochastic_round
from tests.support.cases import BY_NAME, CASES, Case, over
from tests.support.training import (
    FULL,
    assert_fused,
    assert_one_fused_step,
    beside_float64,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    tier,
)

pytestmark = pytest.mark.usefixtures("shipped_kernels")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
SHAPES = [(30, 10), (7,), (), (7,)]

# philox4x32, 10 rounds: counter, key, result, from kat_vectors of the authors' Random123
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """The generator in Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k, q % 2**32, p >> 32 ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def reference_bits(first: int, count: int, seed: int, parameter: int, step: int) -> np.ndarray:
    """16 random bits for each element, as the documentation says; one element after the other."""
    found = []
    for e in range(first, first + count):
        block = e // 128 * 16 + e % 16
        made = reference_philox([block % 2**32, block >> 32, step % 2**32, step >> 32], [seed, parameter])
        half = e // 16 % 8
        found.append(made[half // 2] >> 16 * (half % 2) & 0xFFFF)
    return np.array(found)


def neighbours(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a dtype next to float32 ones, towards 0 and away from it, in float64."""
    magnitude = np.abs(x.astype(np.float64))
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(magnitude, where=magnitude > 0, out=np.full(x.shape, -200.0)))
    spacing = 2.0 ** (np.maximum(exponent, -126 if dtype is BF16 else -14) - (7 if dtype is BF16 else 10))
    low = np.floor(magnitude / spacing) * spacing
    return np.copysign(low, x), np.copysign(low + spacing * (low < magnitude), x)


def reference(x: torch.Tensor, dtype: torch.dtype, noise: np.ndarray) -> torch.Tensor:
    """Stochastic rounding in numpy's float64."""
    given = x.detach().flatten().numpy()
    low, high = neighbours(given, dtype)
    with np.errstate(invalid="ignore"):
        distance = np.where(low == high, 0.0, (given.astype(np.float64) - low) / np.where(low == high, 1, high - low))
    chosen = np.where(noise + np.round(distance * 65536) >= 65536, high, low)
    made = torch.from_numpy(np.where(np.abs(given) <= torch.finfo(dtype).max, chosen, given.astype(np.float64)))
    return made.to(dtype).view(x.shape)


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(float(v), dtype=torch.float64) for v in values]


def test_known_answers() -> None:
    for counter, key, result in KNOWN_ANSWERS:
        assert reference_philox(words(counter), words(key)) == words(result)
        assert [int(word) for word in philox([torch.tensor(w) for w in words(counter)], words(key))] == words(result)


def test_random_bits() -> None:
    """Those of the reference, wherever one begins: with a large seed, step and first element."""
    for first, count, seed, parameter, step in [
        (0, 300, 0, 0, 1),
        (131, 7, 2**32 - 1, 5, 2**33 + 1),
        (2**41, 40, 3, 2, 9),
    ]:
        got = random_bits(first, count, seed, parameter, step)
        assert np.array_equal(got.numpy(), reference_bits(first, count, seed, parameter, step))


VALUES = {
    BF16: [1.0, 1.001, -3.14159, 1e-30, 2.0**-126 * 1.003, 1e-40, -1e-41, 65504.3, 3.38e38],
    F16: [1.0, 1.0001, -3.14159, 65503.0, 2.0**-14, 2.0**-14 * 0.9999, -1e-5, 3e-8, -1e-7, 2.0**-24 * 2.25],
}


@HALVES
def test_probability_is_the_distance(dtype: torch.dtype) -> None:
    """Of all 65536 noises exactly the share goes up that the distance is, so that the mean is the value."""
    noise = torch.arange(65536, dtype=torch.int32)
    for value in VALUES[dtype]:
        x = torch.full((65536,), value, dtype=F32)
        got = rounded(x, noise, dtype).double()
        (low,), (high,) = neighbours(x[:1].numpy(), dtype)
        assert set(got.tolist()) <= {low, high}
        share = float((got == high).double().mean()) if low != high else 0.0
        distance = (float(x[0]) - low) / (high - low) if low != high else 0.0
        normal = dtype is BF16 or abs(value) >= 2.0**-14
        assert share == distance if normal else abs(share - distance) <= 2.0**-17, value
        assert torch.equal(got, reference(x, dtype, noise.numpy()).double())


def test_mean_over_steps() -> None:
    """Many draws as steps make them: unbiased within five standard deviations."""
    x, like = torch.full((64,), 1.0 + 0.3 / 128), torch.empty(64, dtype=BF16)
    draws = [stochastic_round(x, like, *numbers(0, 3, 0, step)).double() for step in range(1, 257)]
    up = float((torch.stack(draws) > 1).double().mean())
    assert abs(up - 0.3) < 5 * (0.3 * 0.7 / (64 * 256)) ** 0.5


@HALVES
def test_what_needs_no_rounding(dtype: torch.dtype) -> None:
    """Representable numbers stay, with their signs, whatever the noise; beyond the largest one rounds to nearest."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    for noise in (0, 0x8000, 0xFFFF):
        got = rounded(every, torch.full((2**16,), noise, dtype=torch.int32), dtype)
        assert torch.equal(got.isnan(), every.isnan())
        kept = ~every.isnan()
        assert torch.equal(got[kept].view(torch.int16), every[kept].to(dtype).view(torch.int16))
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest * (1 + 2.0**-20), -largest * (1 + 2.0**-20), largest * (1 + 2.0**-9 * 0.99)])
    for noise in (0, 0xFFFF):
        got = rounded(beyond.float(), torch.full((3,), noise, dtype=torch.int32), dtype)
        assert torch.equal(got, beyond.float().to(dtype)) and got[:2].tolist() == [largest, -largest]


def exact_step(case: Case, params: Any, opt: Any, grads: Any) -> list[torch.Tensor]:
    """What a step gives before it is rounded: one of float32 parameters, from where `opt` is."""
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    other = case.build(others)
    saved = opt.state_dict()
    other.load_state_dict(copy.deepcopy(saved)) if saved["state"] else None
    set_gradients(others, [g.float() for g in grads])
    other.step()
    return [p.detach() for p in others]


EVERY = [c for c in CASES if "clip" not in c.options]
FEW = EVERY if FULL else [BY_NAME[n] for n in ("sgd", "lamb_global")]


@over(tier(EVERY))
@pytest.mark.parametrize("dtype", [BF16, F16] if FULL else [BF16], ids=str)
def test_eager_steps_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    """Every step is that of float32 parameters, rounded by the reference: seed 0, parameter by place, step by count."""
    params = parameters(SHAPES, dtype=dtype)
    opt = case.build(params, state_dtype=F32, stochastic_rounding=True)
    for step in range(1, 4):
        grads = [g.to(dtype) for g in gradients(params, step)]
        want = exact_step(case, params, opt, grads)
        set_gradients(params, grads)
        opt.step()
        for i, (p, w) in enumerate(zip(params, want, strict=True)):
            assert torch.equal(p, reference(w, dtype, reference_bits(0, w.numel(), 0, i, step)))


def side_by_side(case: Case, dtype: torch.dtype, shapes: Any = SHAPES, **options: Any) -> tuple[Any, Any, Any, Any]:
    """An optimizer to compile, and the same for eager steps."""
    params = parameters(shapes, dtype=dtype)
    others = clones(params)
    options = {"state_dtype": F32, "stochastic_rounding": True, **options}
    return params, case.build(params, **options), others, case.build(others, **options)


def train(params: Any, step: Any, others: Any, other: Any, seeds: range) -> None:
    for seed in seeds:
        grads = [g.to(params[0].dtype) for g in gradients(params, seed)]
        set_gradients(params, grads)
        set_gradients(others, [g.clone() for g in grads])
        step()
        other()


def equal(params: Any, others: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@over(FEW)
@pytest.mark.parametrize("dtype", [BF16, F16] if FULL else [BF16], ids=str)
def test_compiled_steps_round_as_eager_ones(case: Case, dtype: torch.dtype) -> None:
    """In one kernel without a byte more of traffic. Bit for bit where both compute the same before they round."""
    params, opt, others, other = side_by_side(case, dtype)
    step = compiled(opt)
    train(params, step, others, other.step, range(4))
    if case.name in ("sgd", "adamw"):
        assert equal(params, others)
    else:  # norms and divisions may differ in a last bit, which seldom decides
        pairs = zip(params, others, strict=True)
        assert sum(int((p != q).sum()) for p, q in pairs) <= 0.02 * sum(p.numel() for p in params)
    assert_fused(last_report(), parameters=len(params))
    assert_one_fused_step(step.function)  # no tensor of random numbers, nor a copy
    nearest = case.build(clones(params), state_dtype=F32)
    set_gradients(nearest.param_groups[0]["params"], [p.grad for p in params])
    moved = last_report().groups[0].bytes_per_element
    compiled(nearest)()
    assert moved == last_report().groups[0].bytes_per_element


@pytest.mark.parametrize("dtype", [BF16, F16] if FULL else [F16], ids=str)
def test_threads_and_chunks(dtype: torch.dtype) -> None:
    """The same bits with any number of threads, for tensors of several chunks, and many of them."""
    threads, shapes = torch.get_num_threads(), [(40000,), *[(129,)] * 20]
    params, opt, others, other = side_by_side(BY_NAME["adamw"], dtype, shapes)
    again = clones(params)
    repeated = BY_NAME["adamw"].build(again, state_dtype=F32, stochastic_rounding=True)
    step, step_again = compiled(opt), compiled(repeated)
    try:
        for seed in range(3):
            torch.set_num_threads(1)
            train(params, step.function, others, other.step, range(seed, seed + 1))
            torch.set_num_threads(4)
            set_gradients(again, [p.grad for p in params])
            step_again.function()
    finally:
        torch.set_num_threads(threads)
    assert equal(params, others) and equal(params, again)
    assert not torch.equal(params[1].detach(), params[2].detach())


def test_memory_in_another_order() -> None:
    """Elements are counted in the parameter's order in memory, whatever a gradient's."""
    params, opt, others, other = side_by_side(BY_NAME["adamw"], BF16, [(4, 3, 5, 6)])
    for p in (*params, *others):
        p.data = p.data.to(memory_format=torch.channels_last)
    step = compiled(opt)
    for seed, layout in enumerate((torch.contiguous_format, torch.channels_last, torch.contiguous_format)):
        (grad,) = gradients(params, seed)
        for p in (*params, *others):
            p.grad = grad.bfloat16().to(memory_format=layout).clone(memory_format=torch.preserve_format)
        step()
        other.step()
    assert equal(params, others)


def test_a_small_lr_moves_parameters() -> None:
    """Where rounding to nearest loses the steps: less error against float64, in less memory than master weights."""
    errors = {}
    for chance in (True, False) if FULL else (True,):
        start, got, want = beside_float64(200, 1e-4, stochastic_rounding=chance)
        errors[chance] = float((got - want).mean().abs())
        moved = float((want - start).mean().abs())
    assert errors[True] < 0.05 * moved and errors.get(False, moved) > 0.3 * moved, (errors, moved)


@pytest.mark.parametrize("how", ["loaded", "deepcopy", "pickle"] if FULL else ["loaded"])
def test_resumed_runs_go_on_bit_for_bit(how: str) -> None:
    """The seed and the counters are saved; SGD without momentum has a counter, too, for its rounding."""
    for name in ("adamw", "sgd") if FULL else ("sgd",):
        params, opt, others, _ = side_by_side(BY_NAME[name], BF16)
        opt.param_groups[0]["rounding_seed"] = 2**32 - 1
        step = compiled(opt)
        train(params, step, others, lambda: None, range(3))
        assert all(int(opt.state[p]["step"]) == 3 for p in params)
        if how == "loaded":
            again = clones(params)
            resumed = BY_NAME[name].build(again, state_dtype=F32, stochastic_rounding=True)
            resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
        elif how == "deepcopy":
            resumed = copy.deepcopy(opt)
        else:
            resumed = pickle.loads(pickle.dumps(opt))
        again = resumed.param_groups[0]["params"]
        assert resumed.param_groups[0]["rounding_seed"] == 2**32 - 1 and resumed.stochastic_rounding
        train(params, step, again, compiled(resumed), range(3, 6))
        assert equal(params, again)
        assert_fused(last_report(), parameters=len(params))


def test_groups_and_missing_gradients() -> None:
    """A parameter's noise follows from its place and its own count of steps: not from what others do."""
    params, opt, others, other = side_by_side(BY_NAME["adamw"], BF16, [(30, 10), (7,)])
    step = compiled(opt)
    train(params, step, others, other.step, range(2))
    for p, q in ((params, opt), (others, other)):
        more = parameters([(9,), (8,)], dtype=BF16)
        q.add_param_group({"params": more, "lr": 1e-3, "rounding_seed": 5})
        p += more
    for seed in range(2, 6):
        grads = [g.to(BF16) for g in gradients(params, seed)]
        missing = {2: 0, 3: 3}.get(seed)
        set_gradients(params, [None if i == missing else g for i, g in enumerate(grads)])
        set_gradients(others, [None if i == missing else g.clone() for i, g in enumerate(grads)])
        want = exact_step(BY_NAME["adamw"], params[:1], _alone(opt, params[0]), grads[:1]) if seed == 4 else None
        step()
        other.step()
        if want is not None:  # the first parameter's fourth step: one was left out
            assert torch.equal(params[0], reference(want[0], BF16, reference_bits(0, 300, 0, 0, 4)))
    assert equal(params, others)
    assert [int(opt.state[p]["step"]) for p in params] == [5, 6, 4, 3]
    opt.param_groups[0]["rounding_seed"] = 1  # counts at the next step
    train(params, step, others, other.step, range(6, 7))
    assert not torch.equal(params[0], others[0]) and torch.equal(params[2], others[2])


def _alone(opt: Any, param: Any) -> Any:
    """The state of one parameter as an optimizer's."""
    alone = BY_NAME["adamw"].build([torch.nn.Parameter(param.detach().float())])
    alone.state[alone.param_groups[0]["params"][0]] = dict(opt.state[param])
    return alone


def test_other_dtypes_are_as_without_it() -> None:
    """float32 parameters of the same optimizer are rounded to nearest, and have no more than before."""
    params, others = [*parameters([(5,)], dtype=BF16), *parameters([(3, 2)])], parameters([(3, 2)])
    options: Any = {"lr": 0.1}
    opt, other = (
        optimizers.NpuFusedSGD(params, stochastic_rounding=True, **options),
        optimizers.NpuFusedSGD(others, **options),
    )
    step = compiled(opt)
    others[0].data.copy_(params[1].data)
    for seed in range(3):
        set_gradients(params, [g.to(p.dtype) for g, p in zip(gradients(params, seed), params, strict=True)])
        set_gradients(others, [params[1].grad.clone()])
        step()
        other.step()
    assert torch.equal(params[1], others[0]) and not opt.state[params[1]] and opt.state[params[0]].keys() == {"step"}
    assert_fused(last_report(), parameters=2)


def test_check_numerics() -> None:
    params, opt, _, _ = side_by_side(BY_NAME["adamw"], BF16)
    set_gradients(params, [g.to(BF16) for g in gradients(params, 0)])
    compiled(opt, check_numerics=True)()
    assert last_report().checked_steps == 1 and last_report().checked_against == ["the original"], last_report()


def test_a_loaded_checkpoint_without_it() -> None:
    """A checkpoint of torch's, or of an optimizer that rounded to nearest, is taken; it begins at the seed given."""
    params, opt, _, _ = side_by_side(BY_NAME["adamw"], BF16)
    stock = torch.optim.AdamW(clones(params), lr=0.02, weight_decay=0.1)
    set_gradients(stock.param_groups[0]["params"], [g.to(BF16) for g in gradients(params, 0)])
    stock.step()
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0]["rounding_seed"] == 0
    set_gradients(params, [g.to(BF16) for g in gradients(params, 1)])
    compiled(opt)()
    assert int(opt.state[params[0]]["step"]) == 2


def test_wrong_values() -> None:
    make: Any = optimizers.NpuFusedAdamW
    with pytest.raises(npu_fuse_pass.OptionError, match="stochastic_rounding=1: allowed are True and False"):
        make(parameters(), stochastic_rounding=1)
    with pytest.raises(npu_fuse_pass.OptionError, match="choose one of them"):
        make(parameters(), stochastic_rounding=True, master_weights=True)
    for seed in (-1, 2**32, 0.5, True, "a"):
        with pytest.raises(npu_fuse_pass.OptionError, match=r"rounding_seed=.* allowed are whole numbers"):
            make([{"params": parameters(), "rounding_seed": seed}], stochastic_rounding=True)
    params = parameters([(3,)], dtype=BF16)
    opt = make(params, stochastic_rounding=True)
    before = params[0].detach().clone()
    set_gradients(params, [torch.ones(3, dtype=BF16)])
    opt.param_groups[0]["rounding_seed"] = -1
    with pytest.raises(npu_fuse_pass.OptionError, match="rounding_seed=-1"):
        opt.step()
    assert torch.equal(params[0], before)

    @npu_fuse_pass.rule(defaults=dict(lr=0.1, rounding_seed=3.0))
    def mine(param, grad, *, lr, rounding_seed):  # type: ignore[no-untyped-def]
        return param - lr * grad * rounding_seed

    with pytest.raises(npu_fuse_pass.RuleError, match="has a hyperparameter 'rounding_seed'"):
        mine(params, stochastic_rounding=True)


def test_where_it_is_not_fused() -> None:
    """As part of a larger function and on an NPU the original step runs, right and with a reason."""
    params, opt, others, other = side_by_side(BY_NAME["adamw"], BF16)

    @torch.compile(backend="npu_fused")
    def function() -> None:
        opt.step()

    with pytest.warns(UserWarning, match="rounds stochastically"):
        train(params, function, others, other.step, range(3))
    assert equal(params, others)
    assert last_report().fallback is not None and "compile opt.step by itself" in str(last_report()), last_report()
    step = compiled(opt, platform="npu")
    with pytest.warns(UserWarning, match="stochastic rounding is not lowered for npu"):
        train(params, step.function, others, other.step, range(3, 5))
    assert equal(params, others) and [reason.code for reason in last_report().fallbacks] == [Code.PLATFORM]
