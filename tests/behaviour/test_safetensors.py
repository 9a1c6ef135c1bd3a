"""State dicts through the real safetensors library."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import npu_fuse_pass
import optimizers
from tests.support.cases import ONE_EACH, Case, over
from tests.support.training import FULL, assert_fused, clones, compiled, last_report, parameters, tier, train

SHAPES = [(30, 10), (7,), (), (7,)]
CASES = tier(ONE_EACH) if not FULL else ONE_EACH


def named(state_dict: Any) -> dict[str, torch.Tensor]:
    """The states of a state dict in one dict, as a file of safetensors holds them."""
    states = state_dict["state"].items()
    return {f"{i}.{name}": t for i, entry in states for name, t in entry.items() if isinstance(t, torch.Tensor)}


def nested(tensors: dict[str, torch.Tensor], groups: Any) -> dict[str, Any]:
    """The state dict again; groups hold numbers, which a training script keeps in its JSON."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, t in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = t
    return {"state": state, "param_groups": groups}


@over(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if FULL else [torch.bfloat16], ids=str)
def test_a_run_goes_on_from_a_file(case: Case, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    """Bit for bit: parameters and compacted states, saved, loaded into another optimizer, compiled."""
    params = parameters(SHAPES, dtype=dtype)
    half: Any = {"state_dtype": torch.float32, "master_weights": True} if dtype is torch.bfloat16 else {}
    opt = case.build(params, **half)
    step = compiled(opt)
    train(params, step, seeds=range(3))
    saved = named(npu_fuse_pass.compact(opt.state_dict()))
    save_file({**saved, **{f"param {i}": p.detach() for i, p in enumerate(params)}}, tmp_path / "o.safetensors")
    groups = npu_fuse_pass.compact(opt.state_dict())["param_groups"]
    train(params, step, seeds=range(3, 5))

    read = load_file(tmp_path / "o.safetensors")
    again = [torch.nn.Parameter(read.pop(f"param {i}")) for i in range(len(params))]
    assert all(torch.equal(read[key], t) and read[key].dtype == t.dtype for key, t in saved.items())
    resumed = case.build(again, **half)
    resumed.load_state_dict(nested(read, groups))
    train(again, compiled(resumed), seeds=range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    assert_fused(last_report(), parameters=len(params))


def test_each_value_is_written_once(tmp_path: pathlib.Path) -> None:
    """Views of one buffer, which this version takes as they do not overlap, and compacted ones: equal files."""
    params = parameters([(50, 20)] * 4)
    opt = optimizers.NpuFusedAdamW(params)
    train(params, opt.step, seeds=range(1))
    save_file(named(opt.state_dict()), tmp_path / "views.safetensors")
    save_file(named(npu_fuse_pass.compact(opt.state_dict())), tmp_path / "compact.safetensors")
    values = sum(p.numel() for p in params) * 4
    written = (tmp_path / "compact.safetensors").read_bytes()
    assert 2 * values <= len(written) < 2 * values + 4000 and written == (tmp_path / "views.safetensors").read_bytes()


def test_another_order_in_memory(tmp_path: pathlib.Path) -> None:
    """Safetensors writes contiguous tensors: states of a channels-last parameter are loaded in either order."""
    params = [torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))]
    opt = optimizers.NpuFusedAdamW(params)
    train(params, opt.step, seeds=range(2))
    made = named(npu_fuse_pass.compact(opt.state_dict()))
    with pytest.raises(ValueError, match="non contiguous"):
        save_file(made, tmp_path / "o.safetensors")
    save_file({key: t.contiguous() for key, t in made.items()}, tmp_path / "o.safetensors")
    again = clones(params)
    resumed = optimizers.NpuFusedAdamW(again)
    resumed.load_state_dict(nested(load_file(tmp_path / "o.safetensors"), opt.state_dict()["param_groups"]))
    train(params, opt.step, seeds=range(2, 4))
    train(again, compiled(resumed), seeds=range(2, 4))
    torch.testing.assert_close(again[0], params[0], rtol=1e-6, atol=0)
    assert_fused(last_report(), parameters=1)
