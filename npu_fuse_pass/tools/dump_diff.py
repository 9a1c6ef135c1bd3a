"""Changes between two dumps, in words."""

from __future__ import annotations

import ast
import difflib
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from npu_fuse_pass.errors import OptionError

Summary = Mapping[str, Any]

_SHARED = re.compile(r"\bx\d+\b")
_MEASURED = re.compile(r'"measured":{[^}]*}')  # on the page
_LINES = 6  # of a file that are listed one by one
_ALIKE = 0.4  # formulas of at least this similarity are one that changed

# fields of a report about a step, and about each of its groups
_STEP = {
    "torch": "torch version",
    "platform": "platform",
    "fallback": "fallback",
    "cause": "cause of the compile",
    "graph_break": "graph break",
}
_GROUP = {
    "updates": "parameters",
    "elements": "elements",
    "dtype": "dtype",
    "device": "device",
    "writes": "what it writes",
    "lowering": "lowering",
    "kernel": "kernel",
    "launches": "kernel calls",
    "bytes_per_element": "bytes per element",
    "layout": "layout",
    "layout_reason": "reason for the layout",
    "note": "note on the kernel",
}
_TOLD = ("01_updates.txt", "02_groups.txt")  # line by line, where the report is the same


def changes(one: pathlib.Path, two: pathlib.Path) -> list[str]:
    """One line per difference, times excepted.

    Args:
        one: a folder of dumps, or of one compile.
        two: the same, later.

    Raises:
        OptionError: a folder is no dump.
    """
    mine, yours = _compiles(one), _compiles(two)
    found = [f"{name} is only in {one}" for name in mine if name not in yours]
    found += [f"{name} is only in {two}" for name in yours if name not in mine]
    for name in (n for n in mine if n in yours):
        told = list(_compile(mine[name], yours[name]))
        found += [f"{name}: {text}" if len(mine) > 1 else text for text in told]
    return found


def _compiles(root: pathlib.Path) -> dict[str, pathlib.Path]:
    if (root / "summary.json").is_file():
        return {"the compile": root}
    folders = sorted(path.parent for path in root.glob("rank_*/compile_*/summary.json"))
    if not folders:
        raise OptionError(f"{root} is no dump: it has neither summary.json nor rank_*/compile_*/summary.json")
    return {str(path.relative_to(root)): path for path in folders}


def _compile(one: pathlib.Path, two: pathlib.Path) -> Iterator[str]:
    mine, yours = (json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in (one, two))
    told = [*_step(mine, yours), *_groups(mine["groups"], yours["groups"])]
    yield from told
    names = sorted({p.name for p in (*one.iterdir(), *two.iterdir())} - {"summary.json", "table.txt"})
    for name in names:
        texts = [_lines(path / name) for path in (one, two)]
        if texts[0] is None or texts[1] is None:
            yield f"{name} is only in {one if texts[1] is None else two}"
        elif texts[0] != texts[1]:
            yield from _file(name, texts[0], texts[1], in_detail=name in _TOLD and not told)


def _lines(path: pathlib.Path) -> list[str] | None:
    """A file's lines, measured times left out; None where there is no such file."""
    if not path.is_file():
        return None
    return _MEASURED.sub("", path.read_text(encoding="utf-8")).splitlines()


def _step(mine: Summary, yours: Summary) -> Iterator[str]:
    yield from _fields(_STEP, mine, yours, "")
    before, after = ({f"{u['op']}: {u['reason']}" for u in s["unfused"]} for s in (mine, yours))
    yield from (f"no longer unfused: {text}" for text in sorted(before - after))
    yield from (f"now unfused: {text}" for text in sorted(after - before))
    traffic = [s["bytes_per_element"].get("after") for s in (mine, yours)]
    if traffic[0] != traffic[1]:
        yield f"memory traffic: {_number(traffic[1])} bytes per element instead of {_number(traffic[0])}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"


def _fields(names: Mapping[str, str], mine: Summary, yours: Summary, prefix: str) -> Iterator[str]:
    for key, name in names.items():
        if mine.get(key) != yours.get(key):
            yield f"{prefix}{name}: {yours.get(key)} instead of {mine.get(key)}"


def _groups(mine: Sequence[Summary], yours: Sequence[Summary]) -> Iterator[str]:
    """Changes of groups. Equal names mean equal formulas; others are compared with the most similar one."""
    before, after = {g["name"]: g for g in mine}, {g["name"]: g for g in yours}
    for name in (n for n in before if n in after):
        yield from _group(before[name], after[name], f"group {name}: ")
    vanished = [g for g in mine if g["name"] not in after]
    appeared = [g for g in yours if g["name"] not in before]
    for old in vanished:
        new = max(appeared, key=functools.partial(_likeness, old), default=None)
        if new is None or _likeness(old, new)[0] < _ALIKE:
            yield f"group {old['name']} vanished: {old['updates']} x {old['dtype']}"
            continue
        appeared.remove(new)
        yield f"group {old['name']} is now {new['name']}"
        yield from _formula(old["formula"].splitlines(), new["formula"].splitlines())
        yield from _group(old, {**new, "kernel": new["kernel"].replace(new["name"], old["name"])}, "  ")
    for new in appeared:
        yield f"group {new['name']} appeared: {new['updates']} x {new['dtype']}"
        yield from (f"  {line}" for line in new["formula"].splitlines())


def _group(old: Summary, new: Summary, prefix: str) -> Iterator[str]:
    yield from _fields(_GROUP, old, new, prefix)
    matches = [(g.get("match") or {}).get("kernel") for g in (old, new)]
    if matches[0] != matches[1]:
        yield f"{prefix}known kernel: {matches[1] or 'none'} instead of {matches[0] or 'none'}"


def _likeness(old: Summary, new: Summary) -> tuple[float, int]:
    """How similar the formulas of two groups are, then how many other fields are equal."""
    ratio = difflib.SequenceMatcher(None, old["formula"], new["formula"], autojunk=False).ratio()
    return ratio, sum(old.get(key) == new.get(key) for key in _GROUP)


def _formula(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Changes of terms, by the name that they define."""
    before = _terms(old)
    after = _renamed(_terms(new), before)
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            yield f"  {name} = {before[name]} is gone"
        elif name not in before:
            yield f"  {name} = {after[name]} is new"
        elif ordered(before[name]) != ordered(after[name]):
            yield f"  {name} is {after[name]} instead of {before[name]}"


def _terms(lines: Sequence[str]) -> dict[str, str]:
    return dict(line.partition(" = ")[::2] for line in lines)


def _renamed(terms: Mapping[str, str], like: Mapping[str, str]) -> dict[str, str]:
    """Terms whose shared values (x0, x1, …) have the names that equal ones have in `like`, and new ones other names."""
    known = {text: name for name, text in like.items() if _SHARED.fullmatch(name)}
    names: dict[str, str] = {}
    made: dict[str, str] = {}
    for name, text in terms.items():
        text = _SHARED.sub(lambda found: names.get(found[0], found[0]), text)
        if _SHARED.fullmatch(name):
            names[name] = known.get(text) or f"x{len(known) + sum(n not in known.values() for n in names.values())}"
        made[names.get(name, name)] = text
    return made


def _file(name: str, old: Sequence[str], new: Sequence[str], in_detail: bool) -> Iterator[str]:
    lines = [
        line for line in difflib.unified_diff(old, new, n=0, lineterm="") if not line.startswith(("---", "+++", "@@"))
    ]
    pairs = [(line[1:].strip(), "was" if line[0] == "-" else "is") for line in lines]
    if not in_detail:
        yield f"{name}: {len(lines)} lines are removed or added"
        return
    yield from (f"{name}: {verb}: {text}" for text, verb in pairs[: 2 * _LINES])
    if len(pairs) > 2 * _LINES:
        yield f"{name}: and {len(pairs) - 2 * _LINES} lines more"


def ordered(text: str) -> str:
    """The formula with terms and factors in a canonical order; unchanged where it cannot be parsed."""
    code = text.replace("·", "*").replace("^", "**").replace("'", "_new")
    try:
        return _ordered(ast.parse(code, mode="eval").body)
    except SyntaxError:
        return text


def _ordered(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        return f"({' '.join(sorted(_parts(node, (ast.Add, ast.Sub), '+', '-')))})"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        return f"({' '.join(sorted(_parts(node, (ast.Mult, ast.Div), '*', '/')))})"
    if isinstance(node, ast.Call):
        return f"{ast.unparse(node.func)}({', '.join(map(_ordered, node.args))})"
    if isinstance(node, ast.UnaryOp):
        return f"{type(node.op).__name__}({_ordered(node.operand)})"
    if isinstance(node, ast.BinOp):
        return f"{type(node.op).__name__}({_ordered(node.left)}, {_ordered(node.right)})"
    return ast.unparse(node)


def _parts(node: ast.expr, ops: tuple[type[ast.operator], ...], plain: str, inverse: str) -> list[str]:
    """Terms of a sum, or factors of a product, each with its sign; a bracket on the right is one of them."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ops):
        mark = inverse if isinstance(node.op, ops[1]) else plain
        return [*_parts(node.left, ops, plain, inverse), f"{mark}{_ordered(node.right)}"]
    return [f"{plain}{_ordered(node)}"]
