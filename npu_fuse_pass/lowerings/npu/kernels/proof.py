"""Whether generated kernels are proved on a machine: a record of the self-test, and what ran at the last start.

Nobody has launched these kernels before their first user, so the default takes them only where the self-test has
compared them with float64, on this chip, with this CANN, this torch_npu and this version.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping

from npu_fuse_pass.lowerings.kernels import cache
from npu_fuse_pass.user_warnings import warn

Machine = Mapping[str, str]
"""What a record holds for: "chip", "CANN", "torch_npu", "npu_fuse_pass", with their versions or names."""
COMMAND = "python -m npu_fuse_pass selftest"


def proven(machine: Machine) -> str:
    """When the self-test passed on such a machine, as a date; "" if it did not."""
    if any(value in ("", "unknown") for value in machine.values()):
        return ""
    kept = cache.kept(_key(machine), "proof")
    try:
        found = json.loads(kept) if kept is not None else {}
    except ValueError:
        return ""
    return str(found.get("date", "")) if isinstance(found, dict) and found.get("machine") == dict(machine) else ""


def record(machine: Machine, compared: int) -> str:
    """Note that the self-test has passed; why that cannot be noted, or ""."""
    unknown = [name for name, value in machine.items() if value in ("", "unknown")]
    if unknown:
        return f"{' and '.join(unknown)} cannot be told on this machine"
    content = {"machine": dict(machine), "date": datetime.date.today().isoformat(), "optimizers": compared}
    return cache.keep(_key(machine), "proof", json.dumps(content).encode())


def withdraw(machine: Machine) -> None:
    """Forget a record: the self-test has failed since."""
    cache.drop(_key(machine), "proof")


def changed(group: str, generated: bool) -> str:
    """What ran a group when it was started last, where that was something else; notes what runs it now.

    Nothing is noted before a generated kernel has run the group.

    Args:
        group: its name, which depends on its formula alone.
        generated: whether a generated kernel runs it now.
    """
    key, now = cache.key_of("runs", group), b"generated" if generated else b"operations"
    before = cache.kept(key, "runs")
    if before == now or (before is None and not generated):
        return ""
    cache.keep(key, "runs", now)
    if before is None:
        return ""
    kinds = ("GE operations", "a generated kernel")
    text = (
        f"{kinds[not generated]} ran this group at the last start, now {kinds[generated]}: results may round otherwise"
    )
    warn(f"npu_fused: {group}: {text}")
    return text


def _key(machine: Machine) -> str:
    return cache.key_of(*(f"{name} {value}" for name, value in sorted(machine.items())))
