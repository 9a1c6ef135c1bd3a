"""What is imported while something loads, pins. Which room may import which: pyproject.toml."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from scripts import private_names
from tests.support.forked import run_script

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("npu_fuse_pass", "optimizers")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Packages besides the standard library and torch: inside functions only. Who may is in pyproject.toml's contracts.
THIRD_PARTY = ("sympy", "torch_npu", "torchair", "ge")  # GE is in CANN
# What is slow to import: only the backend, which torch.compile loads, and Inductor's hook may do so while loading.
COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch")
MAY_LOAD_COMPILER = ("npu_fuse_pass.backend", "npu_fuse_pass.hook")
PRIVATE_TORCH = "npu_fuse_pass.private_torch"  # looks up private names of torch, for all others


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name; `loading`: it happens while the importer loads."""

    module: str
    line: int
    loading: bool


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, name: str, is_package: bool = False) -> list[Import]:
    """Everything that a module imports, also inside functions and by import_module("literal")."""
    found: list[Import] = []
    package = name if is_package else name.rpartition(".")[0]

    def visit(node: ast.AST, loading: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, loading) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{module}.{alias.name}"
                found.append(Import(below if is_module(below) else module, node.lineno, loading))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            literals = [a for a in node.args[:1] if isinstance(a, ast.Constant)]
            found.extend(Import(str(a.value), a.lineno, loading) for a in literals)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children: Iterator[ast.AST] = iter(node.orelse)
        else:
            children = ast.iter_child_nodes(node)
        inner = loading and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            visit(child, inner)

    visit(tree, True)
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def violations(name: str, source: str, is_package: bool = False) -> list[str]:
    """What a module does against the dependency rules, as readable lines."""
    tree = ast.parse(source)
    found = []
    for item in imports(tree, name, is_package):
        top = item.module.split(".")[0]
        where = f"{name}:{item.line}: imports {item.module}"
        if top in THIRD_PARTY:
            if item.loading:
                found.append(f"{where} while loading: import it inside a function")
        elif top not in (*PACKAGES, "torch", "__future__") and top not in sys.stdlib_module_names:
            found.append(f"{where}: torch is the only dependency")
        if item.loading and within(item.module, COMPILER) and name not in MAY_LOAD_COMPILER:
            found.append(f"{where} while loading: only {', '.join(MAY_LOAD_COMPILER)} may")
        if item.loading and top == "optimizers" and name.startswith("npu_fuse_pass"):
            found.append(f"{where} while loading: the name may be a user's own file")
    if name != PRIVATE_TORCH:
        used = private_names.direct(tree)
        found += [f"{name}:{line}: {private} is private: ask {PRIVATE_TORCH} for it" for line, private in used]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_module_keeps_the_dependency_rules(path: pathlib.Path) -> None:
    found = violations(module_name(path), path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("npu_fuse_pass.ir.types", "import numpy", "torch is the only dependency"),
        ("npu_fuse_pass.ir.types", "def f():\n    import numpy as np", "torch is the only dependency"),
        ("npu_fuse_pass.match.find", "import sympy", "while loading"),
        ("npu_fuse_pass.lowerings.npu.program", "try:\n    import torchair\nfinally:\n    pass", "while loading"),
        ("npu_fuse_pass.report.report", "import optimizers", "a user's own file"),
        ("npu_fuse_pass.report.report", "import importlib\nimportlib.import_module('optimizers')", "a user's own"),
        ("npu_fuse_pass.report.report", "import torch._dynamo", "while loading"),
        ("npu_fuse_pass.report.report", "import torch\nx = torch.fx._symbolic_trace.Graph", "is private"),
        ("npu_fuse_pass.report.report", "from torch.optim.optimizer import _params_doc", "is private"),
    ],
)
def test_a_broken_rule_is_noticed(name: str, source: str, complaint: str) -> None:
    assert any(complaint in line for line in violations(name, source))


def test_what_is_allowed_is_not_complained_about() -> None:
    lowering = "import torch\nfrom npu_fuse_pass.ir.types import Group\ndef f():\n    import torchair"
    rule = "import math\nfrom npu_fuse_pass.rules import rule\nfrom ._base import NpuFusedOptimizer"
    assert not violations("npu_fuse_pass.lowerings.npu.program", lowering)
    assert not violations("npu_fuse_pass.optim", "def f():\n    import optimizers")
    assert not violations("optimizers.sgd", rule)


# Fresh processes ------------------------------------------------------------------------------------------


def run(code: str, cwd: pathlib.Path, blocked: tuple[str, ...]) -> str:
    """Run a script in a new interpreter, from its own folder, as if `blocked` were not installed."""
    script = cwd / "script.py"
    script.write_text(f"import sys\nsys.modules |= dict.fromkeys({blocked})\n{code}")
    command = [sys.executable, script.name]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def forked(code: str, cwd: pathlib.Path) -> str:
    """Run a script in a process that has imported torch, and nothing of ours, from its own folder."""
    script = cwd / "script.py"
    script.write_text(code)
    result = run_script(script, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("module", "given"),
    [
        ("npu_fuse_pass.rules.declaration", "torch"),
        ("optimizers.paddle", "torch._dynamo"),  # `step` is marked for Dynamo when the class is made
    ],
)
def test_import_needs_torch_alone_and_loads_lazily(module: str, given: str, tmp_path: pathlib.Path) -> None:
    code = f"import {given}\nbefore = set(sys.modules)\nimport {module}\nprint(*(set(sys.modules) - before))\n"
    new = set(run(code, tmp_path, blocked=("numpy", "torch_npu", "torchair")).split())
    assert {module, module.partition(".")[0]} <= new  # the package's own imports are among them
    assert not {n.split(".")[0] for n in new} - set(sys.stdlib_module_names) - {*PACKAGES, "torch"}
    assert not {n for n in new if within(n, (*COMPILER, "npu_fuse_pass.backend", "npu_fuse_pass.pipeline"))}
    if module.startswith("npu_fuse_pass"):
        assert "optimizers" not in new


def test_every_public_name_exists() -> None:
    import npu_fuse_pass
    import optimizers

    for package in (npu_fuse_pass, optimizers):
        assert [n for n in package.__all__ if not hasattr(package, n)] == []


def test_completion_knows_names_that_were_not_used_yet(tmp_path: pathlib.Path) -> None:
    """And so does the "Did you mean" of Python's errors."""
    code = "import npu_fuse_pass\nprint({*npu_fuse_pass.__all__} - {*dir(npu_fuse_pass)})\n"
    assert run(code, tmp_path, blocked=()).strip() == "set()"


TRAIN = """
import torch, npu_fuse_pass, {module} as library
p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
q = torch.nn.Parameter(torch.tensor([[4.0], [-5.0]]))
p.grad, q.grad = torch.tensor([0.5, 0.25, -1.0]), torch.tensor([[1.0], [-2.0]])
for opt in (library.{name}([p, q], lr=0.5), torch.optim.SGD([p, q], lr=0.5, momentum=0.9)):
    before = [x.detach().clone() for x in (p, q)]
    step = torch.compile(opt.step, backend="npu_fused")
    step()
    report = npu_fuse_pass.reports()[-1]
    assert report.fallback is None and not report.unfused and len(report.groups) == 1, report
    for old, x in zip(before, (p, q)):
        assert not torch.equal(old, x)
print(library.__file__)
"""


def test_a_users_own_optimizers_file_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "optimizers.py").write_text(
        "import npu_fuse_pass\n"
        "@npu_fuse_pass.rule(defaults=dict(lr=1e-3))\n"
        "def sign_descent(param, grad, *, lr):\n"
        "    return (param - lr * grad.sign(),)\n"
    )
    printed = forked(TRAIN.format(module="optimizers", name="sign_descent"), tmp_path)
    assert pathlib.Path(printed.split("\n")[-2]).resolve() == (tmp_path / "optimizers.py").resolve()


def test_a_users_broken_optimizers_file_is_never_loaded(tmp_path: pathlib.Path) -> None:
    (tmp_path / "optimizers.py").write_text("raise RuntimeError('this is not the library')\n")
    code = """
import torch, npu_fuse_pass
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
torch.compile(torch.optim.SGD([p], lr=0.5, momentum=0.9).step, backend="npu_fused")()
assert p.tolist() == [0.5] * 3 and npu_fuse_pass.reports()[-1].fallback is None
"""
    forked(code, tmp_path)


def test_training_works_without_numpy_and_npu_packages(tmp_path: pathlib.Path) -> None:
    run(TRAIN.format(module="optimizers", name="NpuFusedAdam"), tmp_path, blocked=("numpy", "torch_npu", "torchair"))


# Files ----------------------------------------------------------------------------------------------------


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Every text file of the checkout that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" not in data:
            yield name, data.decode("utf-8")


def absolute_paths(text: str) -> list[str]:
    folders = "|".join(["root", "home", "mnt", "srv", "work", "tmp", "Users"])
    return re.findall(rf"(?<![\w.$}}/-])/(?:{folders})/[\w.-]+", text)


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = {name: paths for name, text in tracked_texts() if (paths := absolute_paths(text))}
    assert not found


def test_absolute_paths_are_noticed() -> None:
    for folder in ("home", "work"):
        assert absolute_paths(f'open("/{folder}/someone/data")') == [f"/{folder}/someone"]
    assert not absolute_paths("#!/usr/bin/env bash\nsee docs/home/page and https://example.org/work/item")


def test_pins_agree_and_cover_the_extras() -> None:
    pins = {p.stem: pins_of(p) for p in (ROOT / "requirements").glob("*.txt")}
    for name, versions in pins.items():
        for package, version in versions.items():
            others = {o: v[package] for o, v in pins.items() if v.get(package, version) != version}
            assert not others, f"{package}: {name} has {version}, but {others}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [r for r in project["dependencies"] if not r.startswith("torch>=")] == []
    for extra, wanted in project["optional-dependencies"].items():
        names = {canonical(re.split(r"[<>=~! ]", r)[0]) for r in wanted}
        assert names <= pins[extra].keys(), f"requirements/{extra}.txt lacks {names - pins[extra].keys()}"


def pins_of(path: pathlib.Path) -> dict[str, str]:
    """The exact versions in a requirements file and in those that it includes."""
    pins: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement.startswith("-r "):
            pins |= pins_of(path.parent / requirement[3:].strip())
        elif requirement:
            package, _, version = requirement.partition("==")
            assert version, f"{path.name}: {requirement!r} is not pinned"
            pins[canonical(package)] = version
    return pins


def canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
