"""Causes of recompiles in the user's terms, from Dynamo's failed guards and from changed plans."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from npu_fuse_pass.reasons import Code, Reason


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why something is compiled, and what would keep that from happening again (None: it happens once)."""

    text: str
    remedy: str | None = None


FIRST = Cause("compile")
# words of Dynamo's about a graph break -> what to do
_BROKEN = {
    "unhandled args for method": "call this method as torch documents it now: Dynamo does not take deprecated orders, "
    "x.add_(2, y)",
    "sparse tensor": "use dense gradients (sparse=False in torch.nn.Embedding)",
}

_OWN_STEP = "leave step as RuleOptimizer has it: what a class does beside it belongs in before_step and after_step"
_RULES = "use an optimizer of this package or a rule (optimizers.*, npu_fuse_pass.rule), whose numbers never recompile"
_KEPT = (
    "zero_grad(set_to_none=False) keeps gradients (a gradient of zeros is an update too: momentum and weight decay go "
    "on)"
)
_OUTSIDE = "set and read the numbers of parameter groups outside of the compiled function: there they cost no compile"


class _Guard(NamedTuple):
    """A pattern of failed guards, what happened, and what to do.

    `with_rules`: what to do where rules step in the compiled function, if that is something else.
    `settles`: torch makes a number symbolic at its first change, if it can: there is something to do only after that.
    """

    pattern: str
    cause: str
    remedy: str | None
    with_rules: str | None = None
    settles: bool = False


_ID = re.compile(r"(?<=[^(]), \d+(?=\), type=)")  # of an object, which another process does not have

_GUARDS = [
    _Guard(
        r"\['lr'\] ==",
        "lr is a Python number, which is part of the graph, and it changed",
        f"make it a tensor (lr=torch.tensor(...), which schedulers fill), or {_RULES}",
        _OUTSIDE,
    ),
    _Guard(
        r"param_groups\[\d+\]\['(?!params')\w+'\]( is |\), type=| [=!]= ('|True$|False$))",
        "an option in a parameter group changed, or the type of a number (each has a compile, which is kept)",
        None,
    ),
    _Guard(
        r"\['param_groups'\]|param_groups\[\d+\]\['(?!params')\w+'\].* ([<>]|[=!<>]=) ",
        "a number in a parameter group changed",
        _RULES,
        _OUTSIDE,
    ),
    _Guard(
        r"\.grad\b.* is (not )?None|\.grad\b.*NoneType",
        "other gradients are None than before",
        f"{_KEPT}, or use an optimizer of this package or a rule (optimizers.*, npu_fuse_pass.rule), whose own step "
        "leaves those parameters out without a recompile",
        f"{_KEPT}, or torch.compile(opt.step) alone, which leaves those parameters out without a recompile",
    ),
    _Guard(
        r"\.grad\b.*deallocated",
        "a gradient is another tensor than before",
        "zero_grad(set_to_none=False) keeps gradients",
    ),
    _Guard(r"\.state\b.*\] == -?[\d.]+(e[+-]?\d+)?$", "a Python number in the states changed", _RULES, settles=True),
    _Guard(
        r"( is .*|^)list\(dict\.keys\(.*\.state\)\)\[\d+\]( is |$)",
        "the states are in another order than before",
        "change entries of opt.state in place: those that are removed and made anew come behind the others",
    ),
    _Guard(
        r"\.grad is .*\.grad$",
        "two parameters had one gradient tensor, and have two now",
        "give every parameter a gradient of its own, or npu_fuse_pass.compile_optimizer_(opt)",
    ),
    _Guard(
        r"len\(self\.state|^not \S+\.state$|\.state\b.* (is|in|==|!=) ",
        "the step before this one created states, as first steps do",
        None,
    ),
    _Guard(r"len\(\S+\.param_groups\)|\['params'\]\) ==", "parameters were added or removed", None),
    _Guard(
        r"obj_id\(.*\['params'\]\[\d+\]",
        "the parameters are others than before, or in another order",
        "keep opt.param_groups[...]['params'] as it was at the first step",
    ),
    _Guard(
        r"obj_id\(\w+, .*Parameter'",
        "it was compiled for another parameter: code that Dynamo captures for one at a time has a compile for each",
        "keep what ends graphs out of the loop over parameters (reports of the graphs say what does, and where)",
    ),
    _Guard(
        r"obj_id\(.*\.state\[|\.state\[.*deallocated",
        "the states are other tensors than before (load_state_dict makes new ones), or another optimizer's",
        "load checkpoints before the first step; npu_fuse_pass.compile_step(opt) for each of several optimizers",
    ),
    _Guard(
        r"(deallocated|obj_id|\bid\().*(self|opt)|(self|opt).*deallocated",
        "another optimizer runs the same code (instances of a class share torch's limit of compiles)",
        "npu_fuse_pass.compile_step(opt) gives each optimizer compiles of its own",
    ),
    _Guard(
        r"size mismatch|stride mismatch|dtype mismatch|\.size\(\)|dispatch key",
        "a tensor has another size, layout or dtype than before",
        "keep parameters, gradients and states as they were at the first step",
    ),
    _Guard(
        r"GLOBAL_STATE|grad_mode|default_dtype",
        "torch's global settings differ from those of the compile before",
        "call the step under the same settings (grad mode, autocast, default dtype, deterministic algorithms)",
    ),
]


def recompile(reason: str, with_rules: bool) -> Cause:
    """The cause of a recompile in the user's terms, from the guard that failed.

    Args:
        reason: in Dynamo's words.
        with_rules: an optimizer with a rule steps in the graph.
    """
    guard, _, rest = reason.splitlines()[0].partition("#")
    earlier = re.match(r"\d+/(\d+): ", guard)
    guard = guard[earlier.end() if earlier else 0 :].strip()
    no_longer = f"no longer true: {_ID.sub('', guard)}{_place(rest)}"
    for known in _GUARDS:
        if re.search(known.pattern, guard):
            settles = known.settles and (earlier is None or int(earlier[1]) < 2)
            remedy = None if settles else (with_rules and known.with_rules) or known.remedy
            return Cause(f"{known.cause} ({no_longer})", remedy)
    return Cause(no_longer, None)


def _place(rest: str) -> str:
    """The place of the code that asked for a guard, from its comment: "# code  # file.py:12 in step"."""
    found = re.search(r"(\S+\.py:\d+) in (\w+)", rest)
    return f", {found[1]}, in {found[2]}" if found and "_dynamo/" not in found[1] else ""


def graph_break(text: str, with_rules: bool = False) -> Reason:
    """The reason for a step that runs outside of graphs, from Dynamo's text of the graph break.

    Args:
        with_rules: it is a rule optimizer's, which a class has put a step of its own around.
    """
    if with_rules:
        return Code.NOT_CAPTURED(text, remedy=_OWN_STEP)
    if any(words in text.lower() for words in ("tensor.item()", "data-dependent")):
        return Code.VALUE(text)
    return Code.NOT_CAPTURED(text, remedy=next((r for words, r in _BROKEN.items() if words in text.lower()), None))


def decided_otherwise(numbers: Sequence[tuple[str, bool]]) -> Cause:
    """The cause where numbers turned zero or nonzero. `numbers`: name, and True if it is 0 now."""
    told = dict.fromkeys(f"{name} is {'0 now' if zero else 'no longer 0'}" for name, zero in numbers)
    return Cause(f"{', '.join(told)}; the rule tests for that, and each case is a program that is kept")
