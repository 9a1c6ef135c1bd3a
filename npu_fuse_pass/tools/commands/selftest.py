"""Check this machine: environment, numbers and times, into one report to attach to an issue."""

from __future__ import annotations

import argparse
import pathlib

from npu_fuse_pass.tools.selftest.report import Report
from npu_fuse_pass.tools.selftest.session import run as run_session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("npu_fuse_selftest.md"), help="the report")
    parser.add_argument("--platform", choices=("npu", "cpu"), default="npu", help="cpu: the same on the CPU lowering")
    parser.add_argument("--quick", action="store_true", help="fewer optimizers, small workloads")


def run(given: argparse.Namespace) -> int:
    """Run the command. Returns exit status 0 if all cases are right and fused, else 1; the report has the reason."""
    report = Report(given.out, given.platform, given.quick)
    try:
        report.begin("nothing yet")
    except OSError as e:
        print(f"the report cannot be written to {given.out}: {e.strerror}; choose another place with --out")
        return 1
    passed = run_session(report, given.platform, given.quick)
    print(f"\n{report.verdict.replace('**', '')}\n\nThe report is {given.out}; please attach it to an issue.")
    return 0 if passed else 1
