"""A selftest from the first check to the last line of its report."""

from __future__ import annotations

from collections.abc import Callable

from npu_fuse_pass.tools.selftest.environment import findings
from npu_fuse_pass.tools.selftest.private import anonymous
from npu_fuse_pass.tools.selftest.report import Report


def run(report: Report, platform: str, quick: bool) -> bool:
    """Check the environment, then parity, then times. Returns True if all is well.

    Args:
        report: is filled in and written, before every part.
        platform: "npu", or "cpu": the same with the CPU lowering.
        quick: fewer optimizers and smaller workloads.
    """
    for finding in findings(platform):
        report.environment.append(finding)
        print(finding)
        report.begin(f"environment, after {finding.name}")
        if finding.needed and finding.remedy:
            reason = f"{finding.name}: {finding.value.rstrip('.')}"
            cpu = " The kernels for the CPU are checked by --platform cpu." if platform == "npu" else ""
            report.finish(f"**Nothing was run, because of {reason}.** To go on: {finding.remedy}.{cpu}")
            return False
    failed = _parity(report, platform, quick)
    failed += _times(report, platform, quick)
    if platform == "npu":
        failed += _generated(report, quick)
    ran = f"{len(report.parity)} optimizers compared"
    if failed:
        report.finish(f"**FAILED**: {ran}, {len(failed)} failed: {'; '.join(failed)}")
    else:
        report.finish(f"**Passed**: {ran} with float64, all within their tolerance and fused.")
    return not failed


def _parity(report: Report, platform: str, quick: bool) -> list[str]:
    from npu_fuse_pass.tools.selftest import cases, parity

    failed = []
    for case in cases.cases(quick):
        report.begin(f"parity of {case.name}")
        outcome = parity.compare(case, platform, platform)
        report.parity.append(outcome)
        print(outcome)
        if outcome.verdict != "ok":
            failed.append(f"{case.name} ({outcome.verdict})")
    return failed


def _generated(report: Report, quick: bool) -> list[str]:
    """Check parity with generated kernels, last: they were never launched on such a machine.

    Where all agree with float64, a record in the kernel cache says so, and `kernels="auto"` takes them from then on.
    """
    from npu_fuse_pass.lowerings.npu.kernels import ascend, proof
    from npu_fuse_pass.lowerings.npu.kernels.compiler import Refused
    from npu_fuse_pass.lowerings.npu.kernels.launch import KERNEL
    from npu_fuse_pass.report.report import reports
    from npu_fuse_pass.tools.selftest import cases, parity

    failed, made, machine = [], 0, ascend.machine()
    proof.withdraw(machine)
    try:
        ascend.current()
    except Refused as e:
        report.proof = f"No generated kernels: {anonymous(str(e))}"
        print(report.proof)
        return []
    for case in cases.cases(quick):
        report.proof = "not finished"
        report.begin(f"parity of {case.name} with generated kernels")
        outcome = parity.compare(case, "npu", "npu", kernels="generated")
        report.generated.append(outcome)
        print(f"generated kernels: {outcome}")
        made += any(KERNEL in kernel for kernel in outcome.kernels)
        stepped_down = [
            g.note
            for r in reports()
            for g in r.groups
            if g.kernel != KERNEL and g.elements and "no generated kernel" not in g.note
        ]
        if outcome.verdict != "ok" or stepped_down:
            why = anonymous(stepped_down[0]) if stepped_down else outcome.verdict
            failed.append(f"{case.name} with generated kernels ({why})")
    report.proof = _recorded(failed, made, quick, lambda: proof.record(machine, made))
    print(report.proof)
    return failed


def _recorded(failed: list[str], made: int, quick: bool, record: Callable[[], str]) -> str:
    default = 'kernels="auto" goes on with GE operations'
    if failed:
        return f"**Not proved**: {len(failed)} failed; {default}."
    if not made or quick:
        why = "with --quick too few are compared" if made else "no group had one, and the reports' notes say why"
        return f"Not proved: {why}; {default}."
    if problem := record():
        return f"{made} optimizers agree with float64, but that cannot be noted ({anonymous(problem)}): {default}."
    return f'**Proved**: {made} optimizers agree with float64; kernels="auto" takes generated kernels on this machine.'


def _times(report: Report, platform: str, quick: bool) -> list[str]:
    from npu_fuse_pass.tools.selftest import timing

    report.begin("constants of the device")
    report.constants = timing.constants(platform, quick)
    print(", ".join(f"{name}: {value:.1f}" for name, value in report.constants.items()))
    for family, workload in timing.plan(quick):
        report.begin(f"time of {family.name} on {workload}")
        report.timing.append(timing.measure(family, workload, platform, platform))
        print(report.timing[-1])
    return [f"ours, {t.family} on {t.workload} ({t.failed['ours']})" for t in report.timing if "ours" in t.failed]
