"""The safety net: an internal exception of this package does not end training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from npu_fuse_pass.errors import internal, is_for_users
from npu_fuse_pass.options import Options
from npu_fuse_pass.report.report import CompileReport


@contextmanager
def net(report: CompileReport, options: Options) -> Iterator[None]:
    """Turn internal exceptions into the report's fallback; errors meant for users pass.

    If the block returns, code after it runs only where something was caught. `strict` and `verify` let everything
    pass.
    """
    try:
        yield
    except Exception as e:
        if is_for_users(e) or options.strict or options.verify:
            raise
        report.groups = []
        report.fallbacks = [internal(e)]
