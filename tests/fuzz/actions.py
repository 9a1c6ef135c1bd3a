"""What random programs do between compiled steps, and inside of compiled functions: lines of Python.

{i}, {j}: numbers of parameters. {lr}: a number. {n}: the name of a state. {h}, {v}: a hyperparameter and a value for
it. {s}: a seed. {call}: arguments of the step. {again}: how the step is compiled.
"""

from __future__ import annotations

# what a promise is about is one line: a program without a part of it would break it by itself
_KEPT = "before = states(opt, ps); {}; promise('load_state_dict keeps what is loaded', same(states(opt, ps), before))"

BETWEEN = {
    # numbers
    "lr": 'opt.param_groups[0]["lr"] = {lr}',
    "lr 0": 'opt.param_groups[0]["lr"] = 0.0',
    "lr 0 where all begins": 'opt.state.clear()\nopt.param_groups[0]["lr"] = 0.0\ngradients(ps, {s}, "zeros")',
    "lr of every group": 'for g in opt.param_groups:\n    g["lr"] = {lr}',
    "lr NumPy's": 'opt.param_groups[0]["lr"] = (np.float64 if dtype_of_numbers(ps) == F64 else np.float32)({lr})',
    "lr tensor": 'opt.param_groups[0]["lr"] = torch.tensor({lr}, dtype=dtype_of_numbers(ps))',
    "lr int": 'opt.param_groups[0]["lr"] = 1',
    "weight_decay": 'opt.param_groups[0]["weight_decay"] = {lr}',
    "weight_decay 0": 'opt.param_groups[0]["weight_decay"] = 0',
    "hyperparameter": 'opt.param_groups[0]["{h}"] = {v}',
    "scheduler": "torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step()",
    # groups
    "group replaced": "opt.param_groups[0] = dict(opt.param_groups[0], lr={lr})",
    "group updated": "opt.param_groups[0].update(lr={lr}, weight_decay=0.02)",
    "params reversed": 'opt.param_groups[0]["params"].reverse()',
    "add_param_group": (
        'ps.append(param((3, 4), seed={s}))\nopt.add_param_group({{"params": [ps[-1]], "lr": {lr}}})\n'
        "ps[-1].grad = torch.ones(3, 4)"
    ),
    # states
    "state clear": "opt.state.clear()",
    "state replaced": "import collections\nopt.state = collections.defaultdict(dict)",
    "state of one: clear": "opt.state[ps[{i}]].clear()",
    "state of one: del": "del opt.state[ps[{i}]]",
    "state of one: pop": "opt.state.pop(ps[{i}], None)",
    "state of one: popitem": "opt.state.popitem()",
    "state of one: emptied": "e = opt.state[ps[{i}]]\nwhile e:\n    e.popitem()",
    "state of one: update": "opt.state[ps[{i}]].update({n}=torch.full_like(ps[{i}], 0.5).detach())",
    "state of one: |=": 'e = opt.state[ps[{i}]]\ne |= {{"{n}": torch.full_like(ps[{i}], 0.25).detach()}}',
    "state of one: setdefault": 'opt.state[ps[{i}]].setdefault("{n}", torch.full_like(ps[{i}], 0.5).detach())',
    "state put back": "kept = opt.state.pop(ps[{i}])\nopt.state[ps[{i}]] = kept",
    "state assigned": 'opt.state[ps[{i}]]["{n}"] = torch.full_like(ps[{i}], 0.5).detach()',
    "state .data": 'opt.state[ps[{i}]]["{n}"].data = torch.full_like(ps[{i}], 0.5).detach()',
    "state in place": 'opt.state[ps[{i}]]["{n}"].mul_(0.5)',
    "state in NumPy's memory": (
        'opt.state[ps[{i}]]["{n}"] = torch.from_numpy(np.ones(tuple(ps[{i}].shape), "float32")).to(ps[{i}].dtype)'
    ),
    "state exchanged": (
        "a, b = opt.state[ps[{i}]], opt.state[ps[{j}]]\n"
        'if alike(ps[{i}], ps[{j}]):\n    a["{n}"], b["{n}"] = b["{n}"], a["{n}"]'
    ),
    "states grown": "if ps[{i}].ndim:\n    resized(opt, ps, {i}, grown)",
    "states pruned": "if ps[{i}].ndim:\n    resized(opt, ps, {i}, lambda x: x[1:].clone())",
    # gradients
    "grad None": "ps[{i}].grad = None",
    "grads None": "for p in ps:\n    p.grad = None",
    "grad cloned": "ps[{i}].grad = ps[{i}].grad.clone()",
    "grad in place": "ps[{i}].grad.mul_(0.5)",
    "grad shared": "if alike(ps[{i}], ps[{j}]):\n    ps[{i}].grad = ps[{j}].grad",
    "grad is the parameter": "ps[{i}].grad = ps[{i}].detach()",
    "grads strided": 'gradients(ps, {s}, "strided")',
    "grads expanded": 'gradients(ps, {s}, "expanded")',
    "grads zero": 'gradients(ps, {s}, "zeros")',
    "grads NaN": 'gradients(ps, {s}, "nan")',
    "grads infinite": 'gradients(ps, {s}, "inf")',
    "grads tiny": 'gradients(ps, {s}, "tiny")',
    "grads clipped": "torch.nn.utils.clip_grad_norm_(ps, 0.5)",
    "zero_grad": "opt.zero_grad(set_to_none=False)",
    # memory
    "parameter re-allocated": "ps[{i}].data = ps[{i}].data.clone()",
    "parameter in other memory": "ps[{i}].data = torch.stack([ps[{i}].data] * 2, -1)[..., 1]",
    "parameters in one buffer": (
        "b = torch.cat([p.detach().flatten().float() for p in ps])\nk = 0\nfor p in ps:\n"
        "    if p.dtype == F32:\n        p.data = b[k : k + p.numel()].view(p.shape)\n    k += p.numel()"
    ),
    "parameter in place": "ps[{i}].data.mul_(0.5)",
    "parameter frozen": "ps[{i}].requires_grad_(False)",
    # copies
    "load_state_dict": "opt.load_state_dict(opt.state_dict())",
    "load_state_dict copied": _KEPT.format("opt.load_state_dict(copy.deepcopy(opt.state_dict()))"),
    "load_state_dict pickled": _KEPT.format("opt.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))"),
    "save and load later": (
        "saved = copy.deepcopy(opt.state_dict())\ngradients(ps, {s})\nopt.step()\nopt.load_state_dict(saved)"
    ),
    "deepcopy": "ps, opt = copy.deepcopy((ps, opt))\nstep = {again}",
    "pickle": "ps, opt = pickle.loads(pickle.dumps((ps, opt)))\nstep = {again}",
    "another optimizer": (
        "forget('e', 'a', 'b', 'g', 'kept', 'before', 'saved', 'returned'); "
        "r = weakref.ref(opt.state[ps[0]].get('{n}', opt)); del opt, step; collect(); "
        "promise('the states of a deleted optimizer are gone', r() is None)\n"
        "{make}\nstep = {again}"
    ),
    # calls
    "eager step": "opt.step()",
    "step in a thread": "gradients(ps, {s})\nin_thread(step{comma}{call})",
    "step in inference mode": "in_mode(torch.inference_mode(), step{comma}{call})",
    "step without grad mode": "in_mode(torch.no_grad(), step{comma}{call})",
    "step with a deterministic setting": (
        "torch.use_deterministic_algorithms(True)\nstep({call})\ntorch.use_deterministic_algorithms(False)"
    ),
    "compiled again": "step = {again}",
    "compile_step": "step = by_compile_step(opt)",
    "check_numerics": "step = by_compile_step(opt, check_numerics=True)",
    "compile_optimizer_": "step = by_compile_optimizer(opt)",
    "Dynamo reset": "torch._dynamo.reset()",
    "closure": "step(closure(ps, labels))",
    "two optimizers at once": (
        "others = [param((3, 4), seed=k) for k in range(2)]\ngradients(others, {s})\n"
        "several_threads([compiled(torch.optim.SGD([p], lr=0.1).step) for p in others])\n"
        "observe('others', torch.stack([p.detach() for p in others]))"
    ),
    "pre-hook": "opt.register_step_pre_hook(lambda *a: (ps[0].detach().mul_(0.5), None)[1])",
    "post-hook": "opt.register_step_post_hook(lambda *a: (ps[0].detach().mul_(0.5), None)[1])",
    "clear_cache": "promise('clear_cache deletes its own files and no others', clears_its_own())",
    "names follow": "named, named_grads = [*ps], [p.grad for p in ps]",
    "look": "look()",
}

INSIDE = {
    "in: lr": 'opt.param_groups[0]["lr"] = x',
    "in: lr of every group": 'for g in opt.param_groups:\n    g["lr"] = x',
    "in: lr of a variable": 'g = opt.param_groups[0]\ng["lr"] = x * 0.5',
    "in: lr *=": 'opt.param_groups[0]["lr"] *= 0.5',
    "in: lr tensor": 'opt.param_groups[0]["lr"] = torch.tensor({lr}, dtype=dtype_of_numbers(ps))',
    "in: weight_decay": 'opt.param_groups[0]["weight_decay"] = x',
    "in: hyperparameter": 'opt.param_groups[0]["{h}"] = {v}',
    "in: group updated": "opt.param_groups[0].update(lr=x)",
    "in: group replaced": "opt.param_groups[0] = dict(opt.param_groups[0], lr=x)",
    "in: groups assigned": "opt.param_groups = [dict(g, lr=x) for g in opt.param_groups]",
    "in: states assigned": "opt.state = collections.defaultdict(dict, opt.state)",
    "in: attribute of the optimizer": "opt.note = x",
    "in: state clear": "opt.state.clear()",
    "in: state of one cleared": "opt.state[ps[{i}]].clear()",
    "in: state of one popped": "opt.state.pop(ps[{i}], None)",
    "in: state assigned": 'opt.state[ps[{i}]]["{n}"] = torch.full_like(ps[{i}], 0.5).detach()',
    "in: state in place": 'opt.state[ps[{i}]]["{n}"].mul_(0.5)',
    "in: grad assigned": "ps[{i}].grad = torch.ones_like(ps[{i}]).detach()",
    "in: grad None": "ps[{i}].grad = None",
    "in: grad cloned": "ps[{i}].grad = ps[{i}].grad.clone()",
    "in: grad in place": "ps[{i}].grad.mul_(x)",
    "in: grads clipped": "torch.nn.utils.clip_grad_norm_([p for p in ps if p.dtype == ps[-1].dtype], 0.5)",
    "in: parameter in place": "ps[{i}].mul_(0.5)",
    "in: a parameter's other name": "named[{i}].mul_(0.5)",
    "in: a gradient's other name": "if named_grads[{i}] is not None:\n    named_grads[{i}].mul_(0.5)",
    "in: tensor([x])": "ps[{i}].mul_(torch.tensor([0.5]).to(ps[{i}].dtype))",
    "in: tensor([a, b])": "ps[{i}].mul_(torch.tensor([0.5, 0.25])[1])",
    "in: as_tensor": "ps[{i}].add_(torch.as_tensor([[0.5]]).view(()))",
    "in: full_like": "ps[{i}].add_(torch.full_like(ps[{i}], 1, dtype=torch.int64))",
    "in: arange": "ps[{i}].add_(torch.arange(3).sum() * 0.125)",
    "in: bernoulli_": "ps[{i}].mul_(torch.ones_like(ps[{i}]).bernoulli_(0.5))",
    "in: normal_": "ps[{i}].add_(torch.empty_like(ps[{i}]).normal_(0.0, 0.5))",
    "in: uniform_": "ps[{i}].add_(torch.empty_like(ps[{i}]).uniform_())",
    "in: rand_like": "ps[{i}].add_(torch.rand_like(ps[{i}]))",
    "in: two steps": "opt.step()",
    "in: average": "average.lerp_(ps[{i}].detach().float().sum(), 0.5)",
    "in: closure": "opt.zero_grad()\nwith torch.enable_grad():\n    closure(ps, labels)()",
    # what the function returns: `returned` has the expressions
    "in: returns the parameter": "returned += [ps[{i}]]",
    "in: returns a detached parameter": "returned += [ps[{i}].detach()]",
    "in: returns a view": "returned += [ps[{i}].detach()[..., None]]",
    "in: returns a part": "returned += [ps[{i}].detach().flatten()[:1]]",
    "in: returns a gradient": "returned += [ps[{i}].grad]",
    "in: returns a state": 'returned += [opt.state[ps[{i}]].get("{n}")]',
    "in: returns a new tensor": "returned += [ps[{i}] * 2, ps[{i}].isfinite().all()]",
    "in: returns a number": 'returned += [x * 2, opt.param_groups[0]["lr"]]',
}
RETURNS = "in: returns"  # how the names of those begin
# the other way round in a function: after opt.step()
AFTER = (
    "in: average",
    "in: parameter in place",
    "in: a parameter's other name",
    "in: a gradient's other name",
    "in: lr *=",
    "in: state in place",
    *(name for name in INSIDE if name.startswith(RETURNS)),
)
