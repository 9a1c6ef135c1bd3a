"""`python -m npu_fuse_pass doctor [--steps N] [--check-numerics] --script train.py [arguments of the script]`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

_NOTHING_IN_THE_WAY, _SOMETHING_IN_THE_WAY, _CANNOT_TELL = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "Exit status: 0: every optimizer of the script would run fused, and nothing is in the way; 1: something is; "
        "2: the script cannot be run, or never steps."
    )
    parser.add_argument("--steps", type=int, default=3, help="how many steps to look at (default: 3)")
    parser.add_argument(
        "--check-numerics", action="store_true", help="compare fused steps with the original's, on copies"
    )
    parser.add_argument(
        "--script",
        nargs=argparse.REMAINDER,
        required=True,
        metavar="train.py ...",
        help="comes last: a training script and its arguments; it is run until it has made --steps steps",
    )


def run(given: argparse.Namespace) -> int:
    """Look, examine, print."""
    from npu_fuse_pass.tools.doctor import examine
    from npu_fuse_pass.tools.observe import observe

    script, *arguments = given.script or [""]
    if not os.path.isfile(script):
        return _refuse(f"there is no script {script!r}")
    if given.steps < 1:
        return _refuse(f"--steps {given.steps}: at least one step has to be looked at")
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
    return _SOMETHING_IN_THE_WAY if any(d.findings for d in found) else _NOTHING_IN_THE_WAY


def _refuse(reason: str) -> int:
    print(f"doctor: {reason}", file=sys.stderr)
    return _CANNOT_TELL
