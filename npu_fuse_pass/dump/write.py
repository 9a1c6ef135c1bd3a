"""Write the files of one compile; failures are warnings, not errors."""

from __future__ import annotations

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from npu_fuse_pass.dump import folder
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.page import page
from npu_fuse_pass.dump.script import files
from npu_fuse_pass.dump.text import ge_text, group_text, kernel_text
from npu_fuse_pass.report.report import CompileReport, group_lines, remarks
from npu_fuse_pass.user_warnings import warn

log = logging.getLogger(__name__)

# file -> a function for its text; None: no such file
_FILES: dict[str, Callable[[Contents], str | None]] = {
    "00_dynamo_graph.py": files.captured,
    "01_updates.txt": group_text.updates,
    "02_groups.txt": group_text.groups,
    "03_fused_graph.py": files.script,
    "04_kernel.cpp": kernel_text.kernels,
    "summary.json": lambda c: json.dumps(c.report.to_json(), indent=1, ensure_ascii=False) + "\n",
    "table.txt": lambda c: _table(c.report),
    "index.html": page.page,
}
# the same for GE graphs, which are made again where tensors move
_GE_FILES: dict[str, Callable[[Mapping[str, str]], str | None]] = {
    "05_ge_original.pbtxt": functools.partial(ge_text.file, "original"),
    "05_ge_optimized.pbtxt": functools.partial(ge_text.file, "optimized"),
    "05_ge.txt": ge_text.listing,
    "06_npu_kernel.mlir": lambda graphs: graphs.get("kernel"),
}


def write(root: pathlib.Path, make: Callable[[], Contents]) -> pathlib.Path | None:
    """Write a compile's files into a new folder below `root`; None if it could not be made.

    Args:
        root: the folder for all dumps.
        make: returns the contents.
    """
    try:
        contents, path = make(), folder.new(root)
    except Exception as e:  # a dump is not worth ending a training for
        _warn(f"no dump in {root}", [f"{type(e).__name__}: {e}"])
        return None
    _fill(path, _FILES, contents)
    write_graphs(path, contents.ge_graphs)
    log.info("dumped to %s", path)
    return path


def write_graphs(path: pathlib.Path, graphs: Mapping[str, str]) -> None:
    """Write a compile's GE graphs, over those that are there.

    Args:
        path: the folder of the compile.
        graphs: as in `Contents`.
    """
    _fill(path, _GE_FILES, graphs)


def _table(report: CompileReport) -> str:
    """One line for each group, then what is not fused. Times are in summary.json: they differ from run to run."""
    head = f"npu_fused on {report.platform}, torch {report.torch}"
    return "\n".join([head, *group_lines(report.groups), *remarks(report), ""])


def _fill(path: pathlib.Path, files: Mapping[str, Callable[[Any], str | None]], what: object) -> None:
    failed = []
    for name, text_of in files.items():
        try:
            text = text_of(what)
            if text is None:
                (path / name).unlink(missing_ok=True)  # of a form that does not run any more
            else:
                (path / name).write_text(text, encoding="utf-8")
        except Exception as e:
            failed.append(f"{name} ({type(e).__name__}: {e})")
            log.debug("%s", name, exc_info=True)
    if failed:
        _warn(f"the dump in {path} is not complete", failed)


def _warn(what: str, reasons: list[str]) -> None:
    warn(f"npu_fused: {what}: {'; '.join(reasons)}")
