"""The safety net: an internal exception of this package does not end training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from npu_fuse_pass.errors import FuseError, GraphRefused, Mismatch, Unsupported
from npu_fuse_pass.options import Options
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.report.report import CompileReport

log = logging.getLogger("npu_fuse_pass")

_FOR_THIS_PACKAGE = (GraphRefused, Mismatch, Unsupported)  # internal: one that reaches this point is a fault, too


@contextmanager
def net(report: CompileReport, options: Options) -> Iterator[None]:
    """Turn internal exceptions into the report's fallback; errors meant for users pass.

    If the block returns, code after it runs only where something was caught. `strict` and `verify` let everything
    pass.
    """
    try:
        yield
    except Exception as e:
        for_users = isinstance(e, FuseError) and not isinstance(e, _FOR_THIS_PACKAGE)
        if for_users or options.strict or options.verify:
            raise
        log.debug("internal error", exc_info=True)
        first = next(iter(str(e).splitlines()), "")
        report.groups = []
        report.fallbacks = [Code.INTERNAL(f"internal error: {type(e).__name__}: {first}")]
