"""Formulas as readable mathematics."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.ir.dimensions import EXPAND, OVER
from npu_fuse_pass.ir.expr import DTYPE_NAMES, HALF, Expr, postorder
from npu_fuse_pass.ir.types import Formula

# operation -> (text, how strongly it binds, and how strongly its arguments have to: others get parentheses)
_INFIX: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "add": ("{0} + {1}", 1, (1, 1)),
    "sub": ("{0} - {1}", 1, (1, 2)),
    "mul": ("{0}·{1}", 2, (2, 2)),
    "div": ("{0}/{1}", 2, (2, 3)),
    "neg": ("-{0}", 2, (3,)),
    "pow": ("{0}^{1}", 4, (5, 5)),
    "fma": ("{0}·{1} + {2}", 1, (2, 2, 1)),
    "reciprocal": ("1/{0}", 2, (3,)),
    "lt": ("{0} < {1}", 0, (1, 1)),
    "le": ("{0} <= {1}", 0, (1, 1)),
    "gt": ("{0} > {1}", 0, (1, 1)),
    "ge": ("{0} >= {1}", 0, (1, 1)),
    "eq": ("{0} == {1}", 0, (1, 1)),
    "ne": ("{0} != {1}", 0, (1, 1)),
}
_ATOM = 9
_LONG = 60


def readable(formula: Formula, labels: Sequence[str]) -> str:
    """Every write as `target <- expression`; expressions used more than once are named first."""
    lines, again, texts = _written(formula, labels)
    told = [*lines.values(), *again]
    for slot, e in formula.writes:
        if e.op == "leaf":
            told.append(f"{labels[slot]}' = {texts[id(e)][0]}")
    told += [f"sum over parameters of {texts[id(e)][0]}" for e in formula.contributions]
    return "\n".join(told)


def named_values(formula: Formula, labels: Sequence[str]) -> dict[int, str]:
    """The readable text of every expression of a formula, by `id`: the line that names it, or its term."""
    lines, _, texts = _written(formula, labels)
    return {key: lines.get(key, text) for key, (text, _) in texts.items()}


def readable_term(e: Expr, labels: Sequence[str]) -> str:
    """One expression in a line; long terms in it are left out."""
    texts: dict[int, tuple[str, int]] = {}
    for below in postorder([e]):
        text, strength = _text(below, texts, labels)
        texts[id(below)] = (text, strength) if below is e or len(text) <= _LONG else ("…", _ATOM)
    return texts[id(e)][0]


def _written(formula: Formula, labels: Sequence[str]) -> tuple[dict[int, str], list[str], dict[int, tuple[str, int]]]:
    """Lines that name an expression, lines that write one again, and what terms above say for each (and how strongly
    it binds).
    """
    uses: dict[int, int] = {}
    for e in postorder(formula.roots):
        for a in e.args:
            uses[id(a)] = uses.get(id(a), 0) + 1
    new: dict[int, str] = {}
    again: list[str] = []  # a value that is written to several leaves
    for slot, e in formula.writes:
        if e.op != "leaf":
            first = new.setdefault(id(e), f"{labels[slot]}'")
            again += [f"{labels[slot]}' = {first}"] if first != f"{labels[slot]}'" else []
    texts: dict[int, tuple[str, int]] = {}
    lines: dict[int, str] = {}
    shared = 0
    for e in postorder(formula.roots):
        text, strength = _text(e, texts, labels)
        if id(e) in new:
            lines[id(e)] = f"{new[id(e)]} = {text}"
            text, strength = new[id(e)], _ATOM
        elif uses.get(id(e), 0) > 1 and e.args and e.op != "cast":
            lines[id(e)] = f"x{shared} = {text}"
            text, strength = f"x{shared}", _ATOM
            shared += 1
        texts[id(e)] = (text, strength)
    return lines, again, texts


def _text(e: Expr, texts: dict[int, tuple[str, int]], labels: Sequence[str]) -> tuple[str, int]:
    if e.op in ("leaf", "const"):
        text = labels[e.value] if e.op == "leaf" else f"{e.value:g}"  # type: ignore[index]
        return text, _INFIX["neg"][1] if text.startswith("-") else _ATOM
    if e.op == "cast":
        text, strength = texts[id(e.args[0])]
        return (f"{DTYPE_NAMES[e.dtype]}({text})", _ATOM) if e.dtype in HALF else (text, strength)
    if e.op == "zero":
        return "0", _ATOM
    if e.op == "neg" and e.args[0].op == "leaf" and texts[id(e.args[0])][0].startswith("-"):
        return texts[id(e.args[0])][0][1:], _ATOM  # of a constant that is shown by its value
    if e.op in _INFIX:
        template, strength, wanted = _INFIX[e.op]
        args = []
        for a, least in zip(e.args, wanted, strict=True):
            text, has = texts[id(a)]
            args.append(text if has >= least else f"({text})")
        return template.format(*args), strength
    if e.op == EXPAND or e.op in OVER:
        return f"{e.op}({texts[id(e.args[0])][0]})", _ATOM  # sizes differ from member to member
    return f"{e.op}({', '.join(texts[id(a)][0] for a in e.args)})", _ATOM
