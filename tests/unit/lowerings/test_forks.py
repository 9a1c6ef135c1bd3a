"""A fork of a process whose threads have shared steps: these threads do not exist in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked import run_script

SCRIPT = """
import os, signal, sys, torch, npu_fuse_pass
from npu_fuse_pass.lowerings.cpu import input_check

shape, count = eval(sys.argv[1])
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(count)]
opt = torch.optim.SGD(params, lr=0.1, momentum=0.9)
npu_fuse_pass.compile_optimizer_(opt)

def train():
    for _ in range(4):
        for p in params:
            p.grad = torch.full(shape, 0.5)
        opt.step()
        input_check.wait()
    return params[-1].flatten()[-1].item()

train()
npu_fuse_pass.reports()[-1].raise_if_unfused()
ours, theirs = os.pipe()
child = os.fork()
if not child:
    signal.alarm(20)
    os.write(theirs, repr(train()).encode())
    os._exit(0)
os.close(theirs)
assert os.read(ours, 100).decode() == repr(train())
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("tensors", [((100, 100), 10), ((2,), 600)], ids=["shared elements", "shared checks"])
def test_a_fork_steps_alone(tensors: object, tmp_path: Path) -> None:
    """Eager steps of such tensors share no work."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_script(script, repr(tensors))
    assert done.returncode == 0, done.stderr
