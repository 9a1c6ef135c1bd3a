"""`python -m npu_fuse_pass dump`: dump a step as files, explain why it is not fused, compare two dumps."""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from npu_fuse_pass.errors import FuseError, OptionError, PlatformError

if TYPE_CHECKING:
    import torch

    from npu_fuse_pass.tools.follow import Session

_FINE, _WANTING, _USAGE = 0, 1, 2
_OF_OPTIMIZERS = ("params", "shape", "model", "option", "time")  # flags that go with an optimizer's name alone
_PARAMS = 8

_EXAMPLES = """examples:
  dump NpuFusedAdam --model resnet50 --out before        an optimizer of this package, over the shapes of a model
  dump SGD --option momentum=0.9 --params 8 --shape 64x64 --shape 64
  dump NpuFusedLamb --platform npu                       generated NPU kernels to look at, no NPU or CANN needed
  dump --check --script train.py --epochs 1              every compile in a script of yours; exit status 1: see why
  dump --check --steps 3 --script train.py               before you change it: what fusing gains, what is in the way
  dump --check-numerics --script train.py                every step fused and as the original: is it right?
  dump --diff before after                               exit status 0: the same; 1: what changed, in words"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("optimizer", nargs="?", help="NpuFusedAdam, paddle.RMSProp, Adam, … (of torch.optim)")
    parser.add_argument("--params", type=int, metavar="N", help=f"how many parameters (default: {_PARAMS})")
    parser.add_argument("--shape", action="append", default=[], help="of the parameters, in turn (default: 256x256)")
    parser.add_argument("--model", help="the parameters' shapes of resnet50 or gpt2; nothing is downloaded")
    parser.add_argument("--platform", choices=("cpu", "npu"), help="what to compile for")
    parser.add_argument(
        "--kernels",
        choices=("generated", "operations", "dedicated", "elementwise"),
        help="on an NPU; without torch_npu kernels are generated to look at, and the original runs",
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the optimizer")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("npu_fuse_dump"), help="the folder for dumps")
    parser.add_argument("--check", action="store_true", help="fail unless everything is fused, and say why")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="with --check: run N eager steps of the script, and fused ones on copies"
    )
    parser.add_argument(
        "--check-numerics", action="store_true", help="compare every step with the original's; fail at a difference"
    )
    parser.add_argument(
        "--time", action="store_true", default=None, help="measure steps of the optimizer, eager and compiled"
    )
    parser.add_argument("--diff", nargs=2, type=pathlib.Path, metavar=("A", "B"), help="compare two dumps")
    parser.add_argument(
        "--script", nargs=argparse.REMAINDER, metavar="train.py ...", help="comes last: a script and its arguments"
    )


def run(given: argparse.Namespace) -> int:
    """Run the command. Returns exit status 0; 1: --check or --diff found something; 2: wrong usage, or no step."""
    asked = [what for what in ("optimizer", "script", "diff") if getattr(given, what)]
    if len(asked) != 1:
        return _refuse("give one of: the name of an optimizer, --script train.py, --diff A B")
    if given.optimizer and given.optimizer.endswith(".py"):
        return _refuse(f"{given.optimizer!r} is a script: it comes last, after --script")
    unread = next((name for name in _OF_OPTIMIZERS if getattr(given, name) not in (None, [])), None)
    if unread and not given.optimizer:
        return _refuse(f"--{unread} goes with the name of an optimizer")
    if given.model and (given.shape or given.params is not None):
        return _refuse("--model has the shapes of a model: leave --params and --shape out")
    if given.steps is not None and not (given.check and given.script and given.steps > 0):
        return _refuse(
            f"--steps {given.steps}: it goes with --check --script, and at least one step has to be looked at"
        )
    try:
        return _diff(*given.diff) if given.diff else _examine(given) if given.steps else _dump(given)
    except FuseError as e:
        return _refuse(str(e))


def _diff(one: pathlib.Path, two: pathlib.Path) -> int:
    from npu_fuse_pass.tools.dump_diff import changes

    found = changes(one, two)
    print(*(found or [f"{one} and {two} show the same"]), sep="\n")
    return _WANTING if found else _FINE


def _examine(given: argparse.Namespace) -> int:
    """Diagnose the optimizers of an unmodified script: gains from fusing, and obstacles."""
    from npu_fuse_pass.tools.doctor import examine
    from npu_fuse_pass.tools.observe import observe

    script, arguments = _existing(given)
    try:
        seen = observe(script, arguments, given.steps)
    except (Exception, SystemExit):
        traceback.print_exc()
        return _refuse(f"{script} failed before one of its optimizers had made {given.steps} steps: see above")
    if not seen:
        return _refuse(
            f"{script} ended without a step of any torch.optim.Optimizer. Does it train when it is called like this? "
            f"Its arguments were {arguments}"
        )
    found = [examine(one, given.check_numerics) for one in seen]
    print("\n\n".join(map(str, found)))
    return _WANTING if any(d.findings for d in found) else _FINE


def _dump(given: argparse.Namespace) -> int:
    from npu_fuse_pass.tools.follow import Session

    platform = given.platform or (None if given.script else "cpu")
    out = _writable(given.out)
    session = Session(out, platform, given.check_numerics, _kernels(given))
    before = set(out.glob("rank_*/compile_*"))
    failure = _script(session, given) if given.script else _named(session, given)
    problems = session.problems(ended=failure is None and not session.wrong)
    unchecked = given.check_numerics and not session.checked_steps
    folders = sorted(set(out.glob("rank_*/compile_*")) - before)
    if given.time and folders and not failure:
        _time(given, folders[-1] / "index.html")
    for folder in folders:
        print(f"{given.out / folder.relative_to(out)}\n{_indented((folder / 'table.txt').read_text(encoding='utf-8'))}")
    _list("wrong numbers", session.wrong)
    _list("not fused", problems)
    _list("failed", [failure] if failure else [])
    if given.check and not problems and not failure:
        print("everything is fused")
    if given.check_numerics and not session.wrong:
        print(f"{session.checked_steps} steps were compared with the original's" + ": no difference" * (not unchecked))
    wanting = session.wrong or failure or unchecked or (given.check and problems)
    return _WANTING if wanting else _FINE


def _writable(out: pathlib.Path) -> pathlib.Path:
    """The folder for dumps, made if need be; absolute, as a script may change the folder it is in."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out).cleanup()
    except OSError as e:
        raise OptionError(f"--out {out}: no dump can be written there: {e}") from e
    return out.absolute()


def _kernels(given: argparse.Namespace) -> str | None:
    """The option `kernels`; without torch_npu only generated ones can be shown."""
    from npu_fuse_pass.lowerings.npu.environment import require

    if given.kernels or given.platform != "npu":
        return str(given.kernels) if given.kernels else None
    try:
        require()
    except PlatformError:
        return "generated"
    return None


def _list(head: str, lines: list[str]) -> None:
    if lines:
        print(f"{head}:", *map(_indented, lines), sep="\n")


def _named(session: Session, given: argparse.Namespace) -> str | None:
    """Step an optimizer by its name. Returns why the step failed, or None."""
    from npu_fuse_pass.tools.follow import run_optimizer

    make, device = _maker(given)
    if given.time and given.platform == "npu" and device != "npu":
        raise OptionError("--time --platform npu: there is no NPU here, and a CPU's time would say nothing about one")
    return run_optimizer(session, make())


def _maker(given: argparse.Namespace) -> tuple[Callable[[], torch.optim.Optimizer], str]:
    """A factory of the optimizer with new parameters, and their device."""
    import torch

    from npu_fuse_pass.tools import named

    count = _PARAMS if given.params is None else given.params
    shapes = named.shapes_of(given.model, count, given.shape or ["256x256"])
    options = dict(map(named.option, given.option))
    on_npu = given.platform == "npu" and hasattr(torch, "npu") and torch.npu.is_available()
    device = "npu" if on_npu else "cpu"
    return functools.partial(named.make, given.optimizer, shapes, options, device), device


def _time(given: argparse.Namespace, page: pathlib.Path) -> None:
    """Measure steps, print the times, and add them to the page of the last compile."""
    from npu_fuse_pass.dump.page.page import with_times
    from npu_fuse_pass.tools.follow import TIMED, times

    found = times(_maker(given)[0], {"platform": given.platform or "cpu"})
    page.write_text(with_times(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    before, after = (f"{1e3 * found[when]:.3f} ms" for when in ("before", "after"))
    print(f"a step takes {before} eager, {after} compiled (medians of {TIMED})")


def _script(session: Session, given: argparse.Namespace) -> str | None:
    """Run a script. Returns why it failed, or None."""
    from npu_fuse_pass.tools.follow import run_script

    script, arguments = _existing(given)
    try:
        status = run_script(session, script, arguments)
    except Exception as e:
        traceback.print_exc()
        return f"{script}: {type(e).__name__}: {e}"
    return f"{script} ended with exit status {status}" if status else None


def _existing(given: argparse.Namespace) -> tuple[str, list[str]]:
    script, *arguments = given.script
    if not pathlib.Path(script).is_file():
        raise OptionError(f"there is no script {script!r}")
    return script, arguments


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def _refuse(reason: str) -> int:
    print(f"dump: {reason}", file=sys.stderr)
    return _USAGE
