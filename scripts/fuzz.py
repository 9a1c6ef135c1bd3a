"""Run random programs around optimizers, eagerly and compiled side by side, and write a script for each difference.

    python scripts/fuzz.py --minutes 10 --seed 3

Prints what was drawn (actions and kinds of parameters by optimizers) and exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from npu_fuse_pass.lowerings.cpu import input_check  # noqa: E402
from tests.fuzz.draw import Draws  # noqa: E402
from tests.fuzz.run import Finding, Outcome, search  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after about so many minutes")
    parser.add_argument("--programs", type=int, help="stop after so many programs instead")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other programs")
    parser.add_argument("--only", nargs="*", default=(), help="of these optimizers; 'ours' and 'stock' are names, too")
    parser.add_argument("--tries", type=int, default=100, help="how often a difference is asked for while shrinking")
    parser.add_argument("--first", action="store_true", help="stop at the first difference")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("fuzz-output"), help="where scripts are written"
    )
    arguments = parser.parse_args()
    logging.getLogger("npu_fuse_pass").setLevel(logging.ERROR)
    input_check.WORTH = 1  # as for many parameters
    input_check.wait()

    def go_on(outcome: Outcome) -> bool:
        if outcome.findings and arguments.first:
            return False
        if arguments.programs is not None:
            return bool(outcome.programs < arguments.programs)
        return bool(outcome.seconds < 60 * arguments.minutes)

    def write(finding: Finding) -> None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"seed_{arguments.seed}_{len(list(arguments.out.iterdir()))}.py"
        path.write_text(finding.script(), encoding="utf-8")
        print(f"\n{path}: {finding.kind}: {finding.what}", *finding.lines, sep="\n    ", flush=True)

    outcome = search(Draws(arguments.seed, arguments.only), go_on, arguments.tries, write)
    print(f"\n{outcome.draws.table()}\n\nseed {arguments.seed}: {outcome}")
    print(f"{len(outcome.draws.empty())} pairs were not drawn")
    sys.exit(1 if outcome.findings else 0)


if __name__ == "__main__":
    main()
