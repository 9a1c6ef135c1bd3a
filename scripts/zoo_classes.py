"""The public optimizers that scripts/zoo.py runs: libraries, how their classes are constructed, what is expected."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

Params = Sequence[Any]  # parameters, or groups of them
Class = type[torch.optim.Optimizer]

LIBRARIES = {  # module -> distribution
    "timm.optim": "timm",
    "torch_optimizer": "torch-optimizer",
    "optimi": "torch-optimi",
    "schedulefree": "schedulefree",
    "lion_pytorch": "lion-pytorch",
    "adabelief_pytorch": "adabelief-pytorch",
    "prodigyopt": "prodigyopt",
    "madgrad": "madgrad",
    "dadaptation": "dadaptation",
    "adam_atan2_pytorch": "adam-atan2-pytorch",
    "came_pytorch": "came-pytorch",
    "sophia_opt": "sophia-opt",
    "transformers.optimization": "transformers",
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "muon": "muon-optimizer",
    "pytorch_optimizer": "pytorch_optimizer",
    "torchao.optim": "torchao",
    "heavyball": "heavyball",
    "bitsandbytes.optim": "bitsandbytes",
}

LEFT_OUT = {  # classes that are no cases of their own
    "heavyball": r"SOAPBase|PSGDBase",
    # names of one class under other options (paged memory, 8 or 32 bits); what stays stands for them
    "bitsandbytes.optim": r"Paged.*|.*32bit|(AdEMAMix|Adagrad|LAMB|LARS|Lion|RMSprop|SGD)8bit",
}

# What 30 classes have to show: scripts/zoo.sh --sample fails where one shows something worse.
SAMPLE = {
    "timm.optim.AdafactorBigVision": "fused",
    "timm.optim.Adopt": "fused",
    "timm.optim.Lars": "fused",
    "timm.optim.Lion": "fused",
    "timm.optim.MADGRAD": "fused",
    "timm.optim.NAdamW": "fused",
    "timm.optim.NvNovoGrad": "not reached",
    "timm.optim.RMSpropTF": "fused",
    "timm.optim.SGDW": "fused",
    "torch_optimizer.AdaBelief": "fused",
    "torch_optimizer.AdaBound": "fused",
    "torch_optimizer.AdaMod": "fused",
    "torch_optimizer.AggMo": "fused",
    "torch_optimizer.DiffGrad": "fused",
    "torch_optimizer.LARS": "fused",
    "torch_optimizer.Lookahead": "fused with 2 compiles",
    "torch_optimizer.MADGRAD": "fused with 2 compiles",
    "torch_optimizer.PID": "fused",
    "torch_optimizer.QHM": "fused",
    "torch_optimizer.SGDW": "fused",
    "torch_optimizer.Yogi": "fused",
    "optimi.Lion": "fused",
    "optimi.SGD": "fused",
    "lion_pytorch.Lion": "fused",
    "pytorch_optimizer.ADOPT": "fused",
    "pytorch_optimizer.APOLLO": "fused",
    "pytorch_optimizer.AccSGD": "fused",
    "pytorch_optimizer.Gravity": "fused with 2 compiles",
    "pytorch_optimizer.LaProp": "fused with 2 compiles",
    "pytorch_optimizer.MADGRAD": "partly",
}


def classes(library: str) -> dict[str, Class]:
    """Optimizers that a library defines and offers under a public name."""
    if library == "timm.optim":
        _without_models("timm")
    module = importlib.import_module(library)
    found: dict[Class, str] = {}
    for name, value in vars(module).items():
        own = inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
        if not own or value is torch.optim.Optimizer or value.__module__.split(".")[0] != library.split(".")[0]:
            continue
        if not name.startswith("_") and not re.fullmatch(LEFT_OUT.get(library, "-"), name):
            found.setdefault(value, name)
    if library == "heavyball":  # its updates as Python, not compiled by Inductor
        module.utils.compile_mode = module.utils.compile_mode_recommended_to_none = None
    return {name: cls for cls, name in found.items()}


def _without_models(package: str) -> None:
    """Make timm's optimizers importable without its models, which need torchvision."""
    for name, values in ((package, {}), (f"{package}.models", {"group_parameters": None})):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        module = types.ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations)
        vars(module).update(values)
        sys.modules[name] = module


def construct(library: str, cls: Class, params: Params, model: torch.nn.Module, **options: Any) -> Any:
    """An optimizer as its users construct it: defaults, and a usual value for whatever has none."""
    signature = inspect.signature(cls.__init__).parameters
    options = {**_SETTINGS.get(f"{library}.{cls.__name__}", {}), **options}
    lr = signature.get("lr")
    if lr is not None and (lr.default is lr.empty or "required" in repr(lr.default)):
        options.setdefault("lr", 1e-3)
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) is many] for many in (True, False))
    apart = "muon_params" in signature or "polar_params" in signature
    base = _base(library)
    usual: dict[str, Callable[[], Any]] = {
        "params": lambda: rest if apart else list(params),
        "muon_params": lambda: matrices,
        "polar_params": lambda: matrices,
        "param_groups": lambda: [dict(params=matrices, use_muon=True), dict(params=rest, use_muon=False)],
        "model": lambda: model,
        "optimizer": lambda: base(params),
        "wrapped_optimizer": lambda: base(params),
        "base_optimizer": lambda: torch.optim.SGD if "SAM" in cls.__name__ else base(params),
        "specs": lambda: [
            dict(params=matrices, optimizer=_of("heavyball", "Muon")),
            dict(params=rest, optimizer=_of("heavyball", "AdamW")),
        ],
        "num_iterations": lambda: 100,
        "num_data": lambda: 5,
        "betas": lambda: (0.9, 0.999),
        "rho": lambda: 0.05,
    }
    first: list[Any] = []
    for name, parameter in list(signature.items())[1:]:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        if name in options:
            continue
        if name not in usual:
            raise TypeError(f"{cls.__name__} needs {name}, for which there is no usual value")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            first.append(usual[name]())
        else:
            options[name] = usual[name]()
    if "SAM" in cls.__name__ and "base_optimizer" in options:
        options.setdefault("lr", 1e-2)
    return cls(*first, **options)


_SETTINGS: dict[str, dict[str, Any]] = {
    "pytorch_optimizer.AdaShift": {"keep_num": 2},  # by default its first ten steps change nothing
    "pytorch_optimizer.AliG": {"max_lr": 0.1},
}


def _base(library: str) -> Callable[[Params], torch.optim.Optimizer]:
    """What a wrapper wraps."""
    if library == "heavyball":
        return lambda params: _of("heavyball", "AdamW")(params, lr=1e-3)
    return lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def _of(library: str, name: str) -> Any:
    return getattr(importlib.import_module(library), name)
