"""Run steps or whole scripts, and follow every torch.compile with this backend."""

from __future__ import annotations

import contextlib
import pathlib
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from npu_fuse_pass import backend
from npu_fuse_pass.errors import FuseError, NumericsError
from npu_fuse_pass.report.report import new_since, reports
from npu_fuse_pass.tools.explain import why_nothing_is_compiled
from npu_fuse_pass.tools.observe import as_main
from npu_fuse_pass.tools.requests import Request, counted, followed, request_for

TIMED = 20  # steps of which the median is told


class Session:
    """A session in which torch.compile with this backend is followed and writes dumps to a folder.

    Attributes:
        requests: of torch.compile, in order.
    """

    def __init__(
        self, out: pathlib.Path, platform: str | None, check_numerics: bool = False, kernels: str | None = None
    ) -> None:
        self.requests: list[Request] = []
        given = {"dump": out, "platform": platform, "check_numerics": check_numerics or None, "kernels": kernels}
        self._options = {name: value for name, value in given.items() if value is not None}
        self._known = backend.breaks()
        self._before = reports()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Follow what is compiled inside the block."""
        before = torch.compile
        torch.compile = self._wrapped(before)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="npu_fused: not fused")  # the session prints it
                yield
        finally:
            torch.compile = before

    def problems(self, ended: bool = True) -> list[str]:
        """Why something is not fused, in words.

        Args:
            ended: steps were made; otherwise a missing graph is no problem.
        """
        off = why_nothing_is_compiled()
        if off is not None and not any(request.reports for request in self.requests):
            return [off.advised]
        breaks = [text for text in backend.breaks() if text not in self._known]
        captured = any(request.graphs for request in self.requests)
        asked = [r for r in self.requests if r.reports or (ended and (r.graphs or not r.core or not captured))]
        found = [text for request in asked for text in request.problems(breaks)]
        noted = [r for request in self.requests for r in request.reports]
        again = [r for r in new_since(self._before) if not any(r is n for n in noted)]  # planned anew at a step
        found += [f"{r.cause}: {reason}" for r in again for reason in r.reasons]
        if not self.requests and ended:
            found.append(
                'nothing was compiled with torch.compile(..., backend="npu_fused") in this process. What to do: call '
                "npu_fuse_pass.compile_optimizer_(opt) where the script has made its optimizer; python -m "
                "npu_fuse_pass doctor --script ... tries that on copies"
            )
        return found

    @property
    def wrong(self) -> list[str]:
        """Differences that check_numerics found."""
        return [text for request in self.requests for text in request.wrong]

    @property
    def checked_steps(self) -> int:
        """The number of steps that check_numerics has compared."""
        return sum(r.checked_steps for r in new_since(self._before))

    def _wrapped(self, compile: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(model: Any = None, *args: Any, **given: Any) -> Any:
            asked = given.get("backend")
            ours = asked in ("npu_fused", backend.npu_fused) or isinstance(asked, backend.TrackedBackend)
            if not ours:
                return compile(model, *args, **given)
            if model is None:
                return lambda function: wrapped(function, *args, **given)
            own = given.pop("options", None) or {}
            tracked = asked if isinstance(asked, backend.TrackedBackend) else backend.TrackedBackend(own)
            tracked.options = {**tracked.options, **self._options}
            request = request_for(model, tracked.step)
            self.requests.append(request)
            step = compile(model, *args, **{**given, "backend": followed(request, tracked)})
            return counted(request, tracked, model, step)

        return wrapped


def run_optimizer(session: Session, opt: torch.optim.Optimizer) -> str | None:
    """Compile and run a step twice: buffers made in the first one change the graph.

    Returns:
        Why it failed, or None; problems that the session has noted are not failures.
    """
    with session.open():
        step = torch.compile(opt.step, backend="npu_fused")
        if session.requests[-1].hidden:
            return None
        try:
            for _ in range(2):
                step()
        except NumericsError:
            return None
        except Exception as e:
            own = backend.own_error(e)
            return str(own) if isinstance(own, FuseError) else f"{type(e).__name__}: {e}"
    return None


def times(make: Callable[[], torch.optim.Optimizer], options: Mapping[str, Any]) -> dict[str, float]:
    """Median seconds of a step, eager ("before") and compiled ("after"), each with a new optimizer."""
    found = {}
    for when in ("before", "after"):
        opt = make()
        step = opt.step if when == "before" else torch.compile(opt.step, backend="npu_fused", options=dict(options))
        taken = []
        for _ in range(2 + TIMED):  # the first two make states and compile
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        found[when] = statistics.median(taken[2:])
    return found


def run_script(session: Session, path: str, arguments: Sequence[str]) -> int:
    """Run a user's script as `python path arguments` would.

    Returns:
        Its exit status.
    """
    try:
        with as_main(path, arguments), session.open():
            runpy.run_path(path, run_name="__main__")
    except NumericsError:
        return 0  # noted
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return int(e.code or 0)
        print(e.code, file=sys.stderr)  # as Python does at its end
        return 1
    return 0
