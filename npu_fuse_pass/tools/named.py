"""An optimizer by its name, over parameters of given shapes."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from npu_fuse_pass.errors import OptionError
from npu_fuse_pass.rules.declaration import OPTIONS
from npu_fuse_pass.rules.decorator import Rule
from npu_fuse_pass.tools.model_shapes import MODELS, Shape

_SCHEDULED = 0.01  # a learning rate, where an optimizer asks for one


def optimizers() -> dict[str, Callable[..., Any]]:
    """Optimizers by name: the library's, paddle's and torch.optim's."""
    library, paddle = importlib.import_module("optimizers"), importlib.import_module("optimizers.paddle")
    named = [("", torch.optim, n) for n in vars(torch.optim) if n != "Optimizer"]
    named += [("", library, n) for n in library.__all__] + [("paddle.", paddle, n) for n in paddle.__all__]
    return {prefix + n: made for prefix, module, n in named if _makes_optimizers(made := getattr(module, n))}


def _makes_optimizers(value: object) -> bool:
    return isinstance(value, Rule) or (inspect.isclass(value) and issubclass(value, torch.optim.Optimizer))


def make(name: str, shapes: Sequence[Shape], options: Mapping[str, Any], device: str) -> torch.optim.Optimizer:
    """Make an optimizer over random parameters with gradients, from a fixed seed.

    Args:
        name: as in `optimizers`.
        shapes: of the parameters.
        options: for its constructor; a required learning rate has a default.
        device: of the parameters.

    Raises:
        OptionError: an unknown name or option, or a value that the constructor refuses.
    """
    known = optimizers()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
        raise OptionError(f"there is no optimizer {name!r}; did you mean {', '.join(close)}?")
    factory = known[name]
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=random).to(device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(device)
    arguments = _arguments(factory)
    allowed = [n for n, required in arguments.items() if n not in ("params", "parameters")]
    unknown = next((n for n in options if n not in allowed), None)
    if unknown is not None:
        raise OptionError(f"{name} has no option {unknown!r}; it has {', '.join(allowed)}")
    rates = {n: _SCHEDULED for n in ("lr", "learning_rate") if arguments.get(n)}
    place = "parameters" if "parameters" in arguments else "params"
    try:
        made: torch.optim.Optimizer = factory(**{place: params, **rates, **options})
    except Exception as e:  # the constructor's own checks
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise OptionError(f"{name}({given}): {e}") from e
    return made


def _arguments(factory: Callable[..., Any]) -> dict[str, bool]:
    """A constructor's arguments: True for required ones."""
    if isinstance(factory, Rule):
        return {"params": True, **dict.fromkeys([*factory.defaults, *sorted(OPTIONS)], False)}
    parameters = inspect.signature(factory).parameters
    return {n: p.default is inspect.Parameter.empty for n, p in parameters.items()}


def shapes_of(model: str | None, count: int, shapes: Sequence[str]) -> list[Shape]:
    """A model's parameters, or `count` of some shapes in turn.

    Raises:
        OptionError: an unknown model, or an invalid shape.
    """
    if model is not None:
        if model not in MODELS:
            raise OptionError(f"there is no model {model!r}; there are {', '.join(MODELS)}")
        return MODELS[model]()
    if count < 1:
        raise OptionError(f"--params {count}: at least one parameter is needed")
    given = [_shape(text) for text in shapes]
    return [given[i % len(given)] for i in range(count)]


def _shape(text: str) -> Shape:
    parts = text.lower().split("x")
    if not all(p.isdigit() and int(p) > 0 for p in parts):
        raise OptionError(f"--shape {text!r} is none; write 256x256, or 1024")
    return tuple(map(int, parts))


def option(text: str) -> tuple[str, Any]:
    """`lr=0.1` as a name and a value.

    Raises:
        OptionError: it is not of that form.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"--option {text!r}: write name=value, as in --option lr=0.1")
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if value.startswith("torch.") and isinstance(dtype, torch.dtype):
        return name, dtype
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
