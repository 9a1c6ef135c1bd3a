"""`flatten="params"`: who is re-homed, who is refused, and that nothing but addresses changes."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from npu_fuse_pass.errors import OptionError
from npu_fuse_pass.rules import rehome
from tests.support.cases import ONE_EACH, Case, over

SHAPES = ((4, 3), (5,), (), (5,), (2, 3, 2, 2))


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return params


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def adjacent(params: list[Any]) -> bool:
    return all(a.data_ptr() + a.numel() * a.element_size() == b.data_ptr() for a, b in itertools.pairwise(params))


@over(ONE_EACH)
def test_steps_are_the_same(case: Case) -> None:
    both = parameters(), parameters()
    flat, plain = case.build(both[0], flatten="params"), case.build(both[1])
    strides = [p.stride() for p in both[1]]
    assert adjacent(both[0])
    assert not adjacent(both[1])
    assert [p.stride() for p in both[0]] == strides
    for k in range(3):
        for params, opt in zip(both, (flat, plain), strict=True):
            set_gradients(params, k)
            opt.step()
    assert all(map(torch.equal, *both))
    assert adjacent(both[0])
    for a, b in zip(flat.state_dict()["state"].values(), plain.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_only_what_is_asked_for_moves() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    frozen = params[1].data_ptr()
    with pytest.raises(OptionError, match=r'flatten=True: allowed are None and "params"'):
        optimizers.NpuFusedAdam(params, flatten=True)  # type: ignore[arg-type]
    optimizers.NpuFusedAdam(params, flatten="params")
    assert params[1].data_ptr() == frozen
    assert adjacent([params[0], params[2], params[3]])
    before = [p.data_ptr() for p in params]
    optimizers.lion(params, flatten="params")  # they are adjacent already
    assert [p.data_ptr() for p in params] == before


def test_a_parameter_of_inference_mode_stays_where_it_is() -> None:
    """Nobody updates it, and in other memory it would have no version counter, which autograd asks for."""
    params = parameters()
    with torch.inference_mode():
        inference = nn.Parameter(torch.ones(3))
    optimizers.NpuFusedAdam([*params, inference], flatten="params")
    assert adjacent(params) and inference.is_inference()


class Wrapped(Tensor):
    """A tensor subclass as DTensor is one: its elements are elsewhere."""

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("touched")


BASE = torch.randn(7)
# what cannot be re-homed, beside the parameters that are given; and what the error says
REFUSED: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "tied": (lambda params: nn.Parameter(params[0].data.view(-1)), r"parameter 0 and parameter 5 are tied"),
    "view": (lambda params: nn.Parameter(BASE[:3]), r"parameter 5 is a view of another tensor.*clone\(\)"),
    "expanded": (lambda params: nn.Parameter(BASE[:1].expand(3)), r"parameter 5 is expanded.*clone\(\)"),
    "expanded in a storage of its size": (
        lambda params: nn.Parameter(torch.randn(4, 3)[:1].expand(4, 3)),
        r"parameter 5 is expanded.*clone\(\)",
    ),
    "subclass": (lambda params: Wrapped(torch.ones(3)).requires_grad_(), "parameter 5 is a Wrapped"),
    "lazy": (lambda params: nn.UninitializedParameter(), "parameter 5 is not initialised yet"),
    "meta": (lambda params: nn.Parameter(torch.ones(3, device="meta")), "parameter 5 has no elements to move"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_when_made(kind: str) -> None:
    make, reason = REFUSED[kind]
    params = parameters()
    addresses = [p.data_ptr() for p in params]
    with pytest.raises(OptionError, match=reason):
        optimizers.NpuFusedSGD([*params, make(params)], lr=0.1, flatten="params")
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_when_added(kind: str) -> None:
    make, reason = REFUSED[kind]
    params = parameters()
    opt = optimizers.NpuFusedSGD(params, lr=0.1, flatten="params")
    new = [make(params), nn.Parameter(torch.ones(2))]
    addresses = [p.data_ptr() for p in (*params, new[1])]
    with pytest.raises(OptionError, match=reason):
        opt.add_param_group({"params": new})
    assert len(opt.param_groups) == 1
    assert [p.data_ptr() for p in (*params, new[1])] == addresses
    set_gradients(params, 0)
    opt.step()


def test_a_distributed_tensor_is_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), DeviceMesh("cpu", [0, 1]), [Shard(0)]))
        with pytest.raises(OptionError, match=r"parameter 1 is a DTensor"):
            optimizers.NpuFusedAdam([nn.Parameter(torch.ones(2)), sharded], flatten="params")
    finally:
        dist.destroy_process_group()


def test_a_private_npu_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(2))
    monkeypatch.setattr(rehome, "npu_format", lambda p: 29)
    with pytest.raises(OptionError, match="private NPU format 29"):
        optimizers.NpuFusedAdam([p, nn.Parameter(torch.ones(2))], flatten="params")


@pytest.fixture
def trained() -> tuple[list[nn.Parameter], Any]:
    params = parameters()
    opt = optimizers.NpuFusedAdam(params, flatten="params")
    set_gradients(params, 0)
    opt.step()
    return params, opt


def test_what_moves_is_re_homed_where_batches_are_made(trained: tuple[list[nn.Parameter], Any]) -> None:
    params, opt = trained
    new = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    opt.add_param_group({"params": new})
    assert adjacent(new)
    for p in params:
        p.data = p.data.double()
    set_gradients([*params, *new], 1)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert adjacent(params)
    assert not any(map(torch.equal, before, params))


def test_a_parameter_that_was_given_other_memory_stays_there(trained: tuple[list[nn.Parameter], Any]) -> None:
    """Somebody may hold that memory, or the old one: swapping in an average and back is done this way."""
    params, opt = trained
    held, average = params[1].data, torch.full_like(params[1], 7.0)
    kept = held.clone()
    params[1].data = average
    set_gradients(params, 1)
    opt.step()
    assert params[1].data_ptr() == average.data_ptr()
    assert torch.equal(held, kept)
    params[1].data = held
    opt.step()
    assert adjacent(params)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "dump"])
def test_copies(trained: tuple[list[nn.Parameter], Any], copied: Any) -> None:
    params, opt = trained
    model, other = copied((params, opt))
    for p, o in ((params, opt), (model, other)):
        set_gradients(p, 1)
        o.step()
    assert other.flatten == "params"
    assert adjacent(model) == (copied is copy.deepcopy)  # each parameter out of a dump is a view of a whole buffer
    assert model[0].data_ptr() != params[0].data_ptr()
    assert all(map(torch.equal, params, model))
