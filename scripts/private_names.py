"""Writes docs/private_names.md: the private names of torch in the package, where, and what happens without them."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from npu_fuse_pass.private_torch import WITHOUT

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "private_names.md"
PACKAGES = ("npu_fuse_pass", "optimizers")
TABLE = ROOT / "npu_fuse_pass" / "private_torch.py"
OTHERS = ("_ge_converter", "_npu_fused_handle")  # torchair's, and what the package puts on a tensor
BY_TEXT = ("getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller")


def is_private(dotted: str) -> bool:
    """Whether a part of a name begins with one underscore."""
    return any(re.match(r"_(?!_)", part) for part in dotted.split("."))


def direct(tree: ast.AST) -> list[tuple[int, str]]:
    """Private names of torch that a module takes without looking them up: `torch._x`, `from torch.x import _y`.

    What is imported for types alone is never asked for.
    """
    found: list[tuple[int, str]] = []
    imported = {"torch": "torch"}
    for node in _evaluated(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    imported[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    found.append((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.append((node.lineno, f"{node.module}.{alias.name}"))
    for node, root, parts in _chains(tree):
        if isinstance(root, ast.Name) and root.id in imported:
            found.append((node.lineno, ".".join([imported[root.id], *parts])))
    return [(line, name) for line, name in found if is_private(name)]


def looked_up(tree: ast.AST) -> Iterator[str]:
    """Names in full that a module asks `private_torch` for, and those that it holds for that."""
    for node in _evaluated(tree):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and re.fullmatch(r"torch(\.\w+)+", value) and is_private(value):
            yield value


def attributes(tree: ast.AST, own: Iterable[str]) -> Iterator[str]:
    """Private attributes of objects of which the package has not given them to its own."""
    listed = {name.rpartition(".")[2] for name in WITHOUT}
    known, modules = {*own, *OTHERS} - listed, _modules(tree)
    for _, root, parts in _chains(tree):
        if not (isinstance(root, ast.Name) and root.id in modules):
            yield from (part for part in parts if is_private(part) and part not in known)
    for node in _evaluated(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and getattr(called, "attr", getattr(called, "id", None)) in BY_TEXT:
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (text for text in texts if is_private(text) and text not in known)
        elif isinstance(node, ast.Constant) and node.value in listed and is_private(str(node.value)):
            yield str(node.value)


def own_attributes(trees: Iterable[ast.AST]) -> set[str]:
    """What the package's classes define, and what it gives to objects."""
    found: set[str] = set()
    for node in (n for tree in trees for n in _evaluated(tree)):
        if isinstance(node, ast.ClassDef):
            for n in node.body:
                found |= {n.name} if isinstance(n, (ast.FunctionDef, ast.ClassDef)) else _targets(n)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
    return found


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "made")


def uses(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Private name of torch -> the modules that use it; attributes by their own name alone."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    own = own_attributes(trees.values())
    found: dict[str, list[str]] = {}
    for module, tree in trees.items():
        names = [*(n for _, n in direct(tree)), *looked_up(tree), *attributes(tree, own)]
        for name in dict.fromkeys(names):
            found.setdefault(name, []).append(module)
    return found


@functools.cache
def all_uses() -> dict[str, list[str]]:
    """The same of all modules."""
    return uses({**sources(), TABLE.relative_to(ROOT).as_posix(): beside_the_table()})


def sources() -> dict[str, str]:
    """Path -> text of every module but the table's own."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path != TABLE)
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def text() -> str:
    """The page."""
    rows, used = [], all_uses()
    for name, without in WITHOUT.items():
        places = dict.fromkeys([*used.get(name, []), *used.get(name.rpartition(".")[2], [])])
        rows.append(f"| `{name}` | {', '.join(f'`{place}`' for place in places)} | {without} |")
    return "\n".join([_HEAD, *rows, ""])


def beside_the_table() -> str:
    """What the module of the table says beside it."""
    tree = ast.parse(TABLE.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if "WITHOUT" not in _targets(n)]
    return ast.unparse(tree)


_HEAD = """# Private names of torch

The package works with every torch from 2.7.1 on, and some of what it needs has no public name. A later torch may drop
such a name. Then imports and training go on: what only saves time or says something is done in another way, or not;
what cannot be done leaves the step as the original, with a reason (`TORCH`) that names what torch lacks. The log says
so once, and reports have a line for each name that was looked for in vain. `tests/repo/test_private_torch.py` takes
every name away in turn.

Written by `python -m scripts.private_names`. Names behind a class are attributes of its objects.

| name | used in | on a torch without it |
|---|---|---|"""


@functools.cache
def _evaluated(tree: ast.AST) -> Sequence[ast.AST]:
    """All nodes but what is for types alone."""
    found: list[ast.AST] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        found.append(node)
        skipped: tuple[object, ...] = ()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped = tuple(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped = (node.returns,)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            skipped = (node.annotation,)
        waiting += [n for n in ast.iter_child_nodes(node) if n not in skipped]
    return found


def _chains(tree: ast.AST) -> Iterator[tuple[ast.Attribute, ast.AST, list[str]]]:
    """Attributes of attributes, as the outermost node, what they begin at, and the names."""
    inner: set[ast.AST] = set()
    for node in _evaluated(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            parts, root = [node.attr], node.value
            while isinstance(root, ast.Attribute):
                inner.add(root)
                parts.insert(0, root.attr)
                root = root.value
            yield node, root, parts


def _modules(tree: ast.AST) -> set[str]:
    """Names that stand for imported modules and what is in them."""
    listed = (n.names for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)))
    return {alias.asname or alias.name.split(".")[0] for names in listed for alias in names}


def _targets(node: ast.AST) -> set[str]:
    listed = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.id for target in listed for t in ast.walk(target) if isinstance(t, ast.Name)}


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
