"""`opt.state` is a mapping to change as torch.optim's: whatever is done to it counts at the next step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from optimizers import NpuFusedAdam, NpuFusedSGD
from tests.support.cases import BY_NAME, Case
from tests.support.graphs import plans_made
from tests.support.plain import Plain
from tests.support.training import (
    Step,
    assert_close,
    assert_fused,
    clones,
    error,
    gradients,
    last_report,
    parameters,
    set_gradients,
    tier,
    train,
)
from tests.support.unchanged import Unchanged

SHAPES = [(4, 4), (5,), (4, 4), (2, 3, 2), ()]  # two of one shape: their states could be exchanged
NAMES = ("sgd_momentum", "adam", "adam_amsgrad", "adamw", "lamb", "rmsprop_tf_centered", "lion", "paddle_rmsprop")
KINDS = [BY_NAME[n] for n in NAMES]
modes = pytest.mark.parametrize("mode", ["eager", "compiled"])

Edit = Callable[[Any, list[Tensor], list[str]], None]  # of an optimizer, its parameters, the names of its states
EDITS: dict[str, Edit] = {}


def edit(function: Edit) -> Edit:
    EDITS[function.__name__] = function
    return function


def whole(p: Tensor, names: list[str], value: float = 0.5) -> dict[str, Any]:
    return {"step": torch.tensor(2.0), **{n: torch.full_like(p, value).detach() for n in names}}


@edit
def clear_all(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state.clear()


@edit
def clear_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state[params[0]].clear()


@edit
def delete_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    del opt.state[params[0]]


@edit
def pop_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    assert opt.state.pop(params[2]).keys() >= {*names}
    assert opt.state.pop(params[2], None) is None


@edit
def popitem_of_states(opt: Any, params: list[Tensor], names: list[str]) -> None:
    assert opt.state.popitem()[0] is params[-1]


@edit
def popitem_of_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    entry = opt.state[params[1]]
    while entry:
        entry.popitem()


@edit
def pop_every_state(opt: Any, params: list[Tensor], names: list[str]) -> None:
    for n in [*opt.state[params[0]]]:
        opt.state[params[0]].pop(n)


@edit
def delete_every_state(opt: Any, params: list[Tensor], names: list[str]) -> None:
    for n in [*opt.state[params[0]]]:
        del opt.state[params[0]][n]


@edit
def update_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state[params[0]].update({n: torch.full_like(params[0], 0.5).detach() for n in names})
    opt.state[params[1]].update(step=torch.tensor(9.0), **{names[0]: torch.full((5,), 0.25)})


@edit
def merge_into_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    entry = opt.state[params[0]]
    entry |= {names[-1]: torch.full((4, 4), 0.75)}
    opt.state[params[2]] |= whole(params[2], names)


@edit
def update_states(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state.update({p: whole(p, names) for p in params[:2]})
    opt.state |= {params[2]: whole(params[2], names, 0.25)}


@edit
def assign_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state[params[0]] = whole(params[0], names)


@edit
def setdefault(opt: Any, params: list[Tensor], names: list[str]) -> None:
    kept = opt.state[params[0]].setdefault(names[0], torch.full((4, 4), 9.0))
    assert kept.max() < 9
    entry = opt.state[params[1]]
    entry.clear()
    for n, value in whole(params[1], names).items():
        entry.setdefault(n, value)
    assert opt.state.setdefault(params[0], {}).keys() >= {*names}


@edit
def replace_all(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state = {p: whole(p, names) for p in params}


@edit
def assign_state(opt: Any, params: list[Tensor], names: list[str]) -> None:
    for n in names:
        opt.state[params[0]][n] = torch.full((4, 4), 0.5)


@edit
def assigned_tensor_counts_when_the_step_runs(opt: Any, params: list[Tensor], names: list[str]) -> None:
    value = torch.full((4, 4), 0.5)
    opt.state[params[0]][names[0]] = value
    value.mul_(0.5)


@edit
def held_entry(opt: Any, params: list[Tensor], names: list[str]) -> None:
    """The same entry, asked for long before."""
    opt.kept.update({names[0]: torch.full((4, 4), 0.125)})


@edit
def held_tensor(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.kept_tensor.data = torch.full((4, 4), 0.375)


@edit
def data_of_a_state(opt: Any, params: list[Tensor], names: list[str]) -> None:
    for n in names:
        opt.state[params[0]][n].data = torch.full((4, 4), 0.5)
    for value in opt.state[params[1]].values():
        value.data = torch.full_like(value, 0.5)


@edit
def set_and_resize(opt: Any, params: list[Tensor], names: list[str]) -> None:
    for n in names:
        opt.state[params[2]][n].set_(torch.full((4, 4), 0.5))
        state = opt.state[params[1]].get(n)
        state.resize_(9).resize_(5).fill_(0.25)


@edit
def in_place(opt: Any, params: list[Tensor], names: list[str]) -> None:
    for value in opt.state[params[0]].values():
        value.mul_(0.5)


@edit
def exchange_entries(opt: Any, params: list[Tensor], names: list[str]) -> None:
    opt.state[params[0]], opt.state[params[2]] = opt.state[params[2]], opt.state[params[0]]


@edit
def exchange_states(opt: Any, params: list[Tensor], names: list[str]) -> None:
    a, b = opt.state[params[0]], opt.state[params[2]]
    a[names[0]], b[names[0]] = b[names[0]], a[names[0]]


@edit
def put_back_later(opt: Any, params: list[Tensor], names: list[str]) -> None:
    """What is taken out keeps its values while the parameter begins anew."""
    taken = opt.state.pop(params[0])
    state = opt.state[params[2]].pop(names[0])
    opt.state[params[2]][names[0]] = torch.zeros((4, 4))
    one_step(opt, params, 77)
    opt.state[params[0]] = taken
    opt.state[params[2]][names[0]] = state


@edit
def another_parameter(opt: Any, params: list[Tensor], names: list[str]) -> None:
    """In the place of one, with its state."""
    new = torch.nn.Parameter(params[0].detach() * 2)
    opt.state[new] = opt.state.pop(params[0])
    params[0] = opt.param_groups[0]["params"][0] = new


@edit
def grow(opt: Any, params: list[Tensor], names: list[str]) -> None:
    resized(opt, params, names, lambda x: torch.cat((x, torch.zeros_like(x[:1]))))


@edit
def prune(opt: Any, params: list[Tensor], names: list[str]) -> None:
    resized(opt, params, names, lambda x: x[torch.arange(len(x)) != 1])


@edit
def grow_in_place(opt: Any, params: list[Tensor], names: list[str]) -> None:
    """The same parameter and state tensors, of another size."""
    params[0].grad = None
    for t in (params[0], *(opt.state[params[0]][n] for n in names)):
        t.data = torch.cat((t.data, torch.ones(2, 4)))


@edit
def none_for_a_state_that_may_be_absent(opt: Any, params: list[Tensor], names: list[str]) -> None:
    entry = opt.state[params[0]]
    if "exp_avg" not in names and "square_avg" not in names:
        entry[names[0]] = None


def resized(opt: Any, params: list[Tensor], names: list[str], change: Callable[[Tensor], Tensor]) -> None:
    """As 3-D Gaussian splatting does it, for two parameters."""
    for i in (0, 2):
        state = opt.state.get(params[i], None)
        for n in names:
            state[n] = change(state[n])
        del opt.state[params[i]]
        params[i] = opt.param_groups[0]["params"][i] = torch.nn.Parameter(change(params[i].detach()))
        opt.state[params[i]] = state


def one_step(opt: Any, params: list[Tensor], seed: int, step: Callable[[], Any] | None = None) -> None:
    set_gradients(params, gradients(params, seed))
    (opt.step if step is None else step)()


def twin(case: Case, params: list[Tensor]) -> Any:
    """torch.optim's class where there is one, else the rule over plain dictionaries."""
    if case.stock is not None:
        return case.stock(params, foreach=False, **case.options)
    return Plain(case.build(clones(params)), params)


def known(tensors: list[Tensor]) -> list[Tensor]:
    """Comparable: a centered second moment is NaN where the states do not fit each other."""
    return [t.detach().nan_to_num(7.0) for t in tensors]


RUNS = [(name, case, mode) for name in EDITS for case in KINDS for mode in ("eager", "compiled")]


@pytest.mark.parametrize(("name", "case", "mode"), tier(RUNS), ids=lambda x: getattr(x, "name", x))
def test_changes_count_at_the_next_step(case: Case, mode: str, name: str) -> None:
    mine: list[Any] = parameters(SHAPES)
    others: list[Any] = clones(mine)
    opt, other = case.build(mine), twin(case, others)
    step = Step(opt, mode)
    for seed in range(3):
        one_step(opt, mine, seed, step)
        one_step(other, others, seed)
        for o, params in ((opt, mine), (other, others)):
            o.kept, o.kept_tensor = o.state[params[0]], o.state[params[0]][case.states[0]]
    for seed in range(3, 7):
        if seed in (3, 5):
            EDITS[name](opt, mine, list(case.states))
            EDITS[name](other, others, list(case.states))
        one_step(opt, mine, seed, step)
        one_step(other, others, seed)
        assert_close(known(mine), known(others))
        for p, q in zip(mine, others, strict=True):
            for n in case.states:
                assert error(*known([opt.state[p][n], other.state[q][n]])) <= 2e-4, n
            if case.stock is not torch.optim.SGD:  # it keeps no counter
                assert float(opt.state[p]["step"]) == float(other.state[q]["step"])
    step.check_fused(len(mine))


WRONG: list[tuple[str, Any, str]] = [
    ("exp_avg", torch.ones(3), r"state 'exp_avg' of parameter 0 is torch.float32, torch.strided, of shape \(3,\)"),
    ("exp_avg", torch.ones(4, 3), r"of shape \(4, 3\); allowed .* shape \(3, 4\)"),
    ("exp_avg", torch.ones(3, 4) * 1j, r"is torch.complex64, torch.strided, of shape \(3, 4\); allowed"),
    ("exp_avg", torch.ones(3, 4).to_sparse(), r"is torch.float32, torch.sparse_coo, of shape"),
    ("exp_avg_sq", "x", r"state 'exp_avg_sq' of parameter 0 is 'x'; allowed is a dense real tensor"),
    ("exp_avg_sq", 1.0, r"is 1.0; allowed is a dense real tensor of the parameter's shape \(3, 4\)"),
    ("exp_avg_sq", None, r"parameter 0 has 'step', 'exp_avg' and lacks 'exp_avg_sq': give it all of .*clear\(\)"),
    ("step", "seven", r"state 'step' of parameter 0 is 'seven'; allowed are a number and a tensor of one"),
    ("step", torch.ones(2), r"state 'step' of parameter 0 is tensor\(\[1., 1.\]\); allowed"),
]


@modes
@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{n}={v}" for n, v, _ in WRONG])
def test_what_no_step_can_go_on_from_is_refused(mode: str, name: str, value: Any, message: str) -> None:
    """By the next step, as in torch.optim; nothing is changed, and the right value put there is taken."""
    params = parameters([(3, 4), (5,)])
    opt = NpuFusedAdam(params)
    step = Step(opt, mode)
    train(params, step)
    set_gradients(params, gradients(params, 4))
    unchanged, right = Unchanged(opt), opt.state[params[0]][name].clone()
    opt.state[params[0]][name] = value
    with pytest.raises(ValueError, match=message):
        step()
    opt.state[params[0]][name] = right
    unchanged()
    step()
    step.check_fused(len(params))


@modes
def test_a_function_whose_step_is_refused_at_the_first_call(mode: str) -> None:
    """While it is compiled, that is: the error is the same, and the next call is fused."""
    params = parameters([(3, 4), (5,)])
    opt = NpuFusedAdam(params)

    def body() -> None:
        for p in params:
            p.grad.mul_(2)
        opt.step()

    opt.state[params[0]]["exp_avg_sq"] = torch.ones(3, 4)
    npu_fuse_pass.clear_reports()
    function = torch.compile(body, backend="npu_fused") if mode == "compiled" else body
    set_gradients(params, gradients(params, 0))
    for _ in range(2):
        with pytest.raises(ValueError, match="parameter 0 has 'exp_avg_sq' and lacks 'exp_avg'") as caught:
            function()
        assert type(caught.value) is ValueError
    opt.state[params[0]].clear()
    function()
    if mode == "compiled":
        assert_fused(last_report(), parameters=2)


def test_a_parameter_that_grew_without_its_states_is_refused() -> None:
    params = parameters([(3, 4), (5,)])
    opt = NpuFusedAdam(params)
    one_step(opt, params, 0)
    params[0].data = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 is .* shape \(3, 4\); allowed .* \(4, 4\)"):
        one_step(opt, params, 1)


def test_copies_are_plain() -> None:
    """Of an entry, of all, pickled or copied, and of an optimizer: nothing shares memory with the steps that follow."""
    params = parameters([(3, 4), (5,)])
    opt = NpuFusedAdam(params)
    one_step(opt, params, 0)
    entry = opt.state[params[0]]
    for made in (copy.deepcopy(entry), pickle.loads(pickle.dumps(entry)), copy.copy(entry), entry.copy(), {**entry}):
        assert type(made) is dict
        assert made.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(made["exp_avg"], entry["exp_avg"])
    loaded = pickle.loads(pickle.dumps(opt))
    assert all(t.untyped_storage().nbytes() == t.nbytes for made in loaded.state.values() for t in made.values())
    everything = copy.copy(opt.state)
    assert all(everything[p]["exp_avg"] is opt.state[p]["exp_avg"] for p in params)
    other = copy.deepcopy(opt)
    (p,) = [p for p in other.param_groups[0]["params"] if p.shape == (3, 4)]
    other.state[p].clear()
    one_step(other, other.param_groups[0]["params"], 1)
    assert float(other.state[p]["step"]) == 1
    assert float(opt.state[params[0]]["step"]) == 1


@modes
def test_what_stands_at_other_keys_is_the_users(mode: str) -> None:
    """Numbers, tensors and dicts beside the entries of parameters: as with torch.optim, copies and checkpoints too."""
    params = parameters(SHAPES)
    others = clones(params)
    opts = (NpuFusedAdam(params, lr=0.1), torch.optim.Adam(others, lr=0.1))
    steps = (Step(opts[0], mode), opts[1].step)
    notes = {"of_the_run": {"step": torch.tensor(3), "t": torch.ones(2)}, "epoch": 5, "list": [1.5, torch.ones(2)]}
    for opt, step, ps in zip(opts, steps, (params, others), strict=True):
        one_step(opt, ps, 0, step)
        opt.state.update(notes)
        opt.state["made"]["best"] = 0.5
        one_step(opt, ps, 1, step)
        assert opt.state["of_the_run"] is notes["of_the_run"]
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        one_step(opt, ps, 2, step)
        for made in (opt.state_dict()["state"], copy.deepcopy(opt).state, pickle.loads(pickle.dumps(opt)).state):
            kept = {name: made[name] for name in (*notes, "made")}
            assert str(kept) == str({**notes, "made": {"best": 0.5}})
            assert type(kept["made"]) is dict
    assert_close(params, others)


@modes
def test_two_optimizers_may_share_their_states(mode: str) -> None:
    params = parameters(SHAPES)
    others = clones(params)
    for ps, make, way in ((params, NpuFusedAdam, mode), (others, torch.optim.Adam, "eager")):
        first, second = make(ps, lr=0.1), make(ps, lr=0.02)
        one_step(first, ps, 0)
        second.state = first.state
        steps = [Step(opt, way) for opt in (first, second)]
        for seed in range(1, 5):
            one_step(first, ps, seed, steps[seed % 2])
    assert_close(params, others)


@modes
def test_optimizers_may_share_entries(mode: str) -> None:
    """Three of them, the last one by way of the second, which has shared its entries before it got the first one's."""
    params = parameters(SHAPES)
    others = clones(params)
    found = []
    for ps, make, way in ((params, NpuFusedAdam, mode), (others, torch.optim.Adam, "eager")):
        first, second, third = opts = [make(ps, lr=lr) for lr in (0.1, 0.02, 0.05)]
        for opt in opts:
            one_step(opt, ps, 0)
        third.state[ps[0]] = second.state[ps[0]]
        for p in ps:
            second.state[p] = first.state[p]
        third.state[ps[1]] = second.state[ps[1]]
        assert third.state[ps[1]] is first.state[ps[1]]
        steps = [Step(opt, way) for opt in opts]
        for seed in range(1, 7):
            one_step(first, ps, seed, steps[seed % 3])
            found.append([opt.state[p]["exp_avg"].clone() for opt in opts for p in ps])
    assert_close(params, others)
    for ours, torchs in zip(found[:6], found[6:], strict=True):
        assert_close(ours, torchs)


@modes
def test_a_shallow_copy_shares_groups_and_states(mode: str) -> None:
    params = parameters(SHAPES)
    others = clones(params)
    for ps, make, way in ((params, NpuFusedAdam, mode), (others, torch.optim.Adam, "eager")):
        first = make(ps, lr=0.1)
        one_step(first, ps, 0)
        second = copy.copy(first)
        assert second.state is first.state and second.param_groups is first.param_groups
        steps = [Step(opt, way) for opt in (first, second)]
        for seed in range(1, 5):
            second.param_groups[0]["lr"] = 0.1 / seed
            one_step(first, ps, seed, steps[seed % 2])
    assert_close(params, others)


def test_reading_takes_nothing_anew() -> None:
    """Who reads states at every step gets the same tensors, and no plan is made again."""
    params = parameters([(3, 4), (5,)])
    opt = NpuFusedSGD(params, lr=0.1, momentum=0.9)
    step = Step(opt, "compiled")
    seen = set()
    for seed in range(4):
        one_step(opt, params, seed, step)
        seen.add(tuple(id(t) for p in params for t in opt.state[p].values()))
    assert len(seen) == 1 == plans_made(opt)
    step.check(len(params))


@modes
@pytest.mark.parametrize("given", ["before any step", "after two"])
def test_states_of_a_parameter_without_a_gradient_count_when_it_has_one(mode: str, given: str) -> None:
    """As torch.optim's: nobody reads them before, so that they may be there one by one; then they have to be whole."""
    params = parameters([(3, 4), (5,), (5,)])
    others = clones(params)
    opt, stock = NpuFusedAdam(params, lr=0.1), torch.optim.Adam(others, lr=0.1)
    step, seeds = Step(opt, mode), iter(range(10))

    def both(missing: int | None = None) -> None:
        grads = [None if i == missing else g for i, g in enumerate(gradients(params, next(seeds)))]
        set_gradients(params, grads)
        set_gradients(others, grads)
        step()
        stock.step()
        assert_close(params, others)

    if given == "after two":
        both()
        both()
        for some, o in ((params, opt), (others, stock)):
            o.state[some[1]].pop("exp_avg")
    else:
        opt.state[params[1]]["exp_avg_sq"] = torch.full((5,), 0.5)
    both(missing=1)
    both(missing=1)
    step.check_fused(2)
    before = [p.detach().clone() for p in params]
    set_gradients(params, gradients(params, 9))
    with pytest.raises(ValueError, match=r"parameter 1 has .*'exp_avg_sq'.* and lacks 'exp_avg'"):
        step()
    assert all(map(torch.equal, params, before))
    for some, o in ((params, opt), (others, stock)):
        if given == "after two":
            o.state[some[1]]["exp_avg"] = torch.full((5,), 0.25)
        else:
            o.state[some[1]].update(step=torch.tensor(3.0), exp_avg=torch.zeros(5), exp_avg_sq=torch.full((5,), 0.5))
    both()
    both()
    step.check_fused(3)


@modes
def test_entries_come_in_the_order_of_the_parameters(mode: str) -> None:
    """As torch.optim's, which `popitem` shows, whatever is computed together; a late one comes last."""
    params = [*parameters([(3,), (3,)], torch.float64), *parameters([(5,), (4,)]), *parameters([(3,)], torch.float64)]
    params = [params[i] for i in (0, 2, 1, 3, 4)]
    others = clones(params)
    opt, stock = NpuFusedAdam(params), torch.optim.Adam(others)
    step = Step(opt, mode)
    for seed in range(2):
        for some in (params, others):
            set_gradients(some, [None if i == 1 and not seed else g for i, g in enumerate(gradients(some, seed))])
        step()
        stock.step()
        names = {id(p): i for some in (params, others) for i, p in enumerate(some)}
        assert [names[id(p)] for p in opt.state] == [names[id(p)] for p in stock.state]
        assert [*opt.state_dict()["state"]] == [*stock.state_dict()["state"]]
    step.check_fused(5)
