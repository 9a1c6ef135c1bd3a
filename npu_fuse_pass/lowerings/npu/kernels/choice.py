"""Which kernels an NPU program is made of, in the order in which they are tried, and why not generated ones."""

from __future__ import annotations

import dataclasses

from npu_fuse_pass.lowerings.npu.kernels import ascend, hardware, proof
from npu_fuse_pass.lowerings.npu.kernels.compiler import Refused

GENERATED, OPERATIONS, DEDICATED, ELEMENTWISE = "generated", "operations", "dedicated", "elementwise"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the option `kernels` comes to on a machine.

    Attributes:
        forms: values of the option, in the order in which they are tried.
        hardware: for generated kernels.
        why: for the report: why there are none, or how far they are proven; "" where they were not asked for.
    """

    forms: tuple[str, ...]
    hardware: hardware.Hardware | None = None
    why: str = ""


def choose(kernels: str) -> Choice:
    """Decide for the option `kernels`; torch_npu can be imported here."""
    after = {DEDICATED: (DEDICATED, ELEMENTWISE), ELEMENTWISE: (ELEMENTWISE,)}.get(kernels, (OPERATIONS, ELEMENTWISE))
    if kernels not in ("auto", GENERATED):
        return Choice(after)
    try:
        date = proof.proven(ascend.machine())
        if kernels == "auto" and not date:
            raise Refused(f"not proved on this machine, see {proof.COMMAND}")
        proved = f"proved on this machine by the self-test of {date}" if date else "not proved on this machine"
        return Choice((GENERATED, *after), ascend.current(), proved)
    except Refused as e:
        return Choice(after, why=f"no generated kernels: {e}")
    except Exception as e:  # of CANN's libraries
        return Choice(after, why=f"no generated kernels: {type(e).__name__}: {e}")
