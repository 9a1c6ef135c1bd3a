"""GE graphs in text form for a dump: as converted, and as GE gets them at the first run.

torchair writes both if its configuration asks for it (`debug.graph_dump`), which is used here.
"""

from __future__ import annotations

import copy
import logging
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)


class Texts:
    """The graphs of the program that was converted last.

    Attributes:
        graphs: in protobuf's text form: "original", and "optimized" once it has run; "kernel": generated kernels.
    """

    def __init__(self) -> None:
        self.graphs: dict[str, str] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="npu_fuse_ge_")
        self._show: Callable[[Mapping[str, str]], None] | None = None
        self._waits = False

    def follow(self, show: Callable[[Mapping[str, str]], None]) -> None:
        """Call `show` with the graphs whenever they change."""
        self._show = show

    def kernels(self, text: str) -> None:
        """Set the sources of generated kernels; "": none run now."""
        self.graphs.pop("kernel", None)
        if text:
            self.graphs["kernel"] = text
        elif self._show is not None:
            self._show(self.graphs)

    def config(self, config: Any) -> Any:
        """Copy torchair's configuration, with dumps of graphs on.

        Returns `config` itself if torchair writes them for the user already, or makes no GE graph.
        """
        self._waits = False
        try:
            if config.debug.graph_dump.enabled or config.mode.value != "max-autotune":
                return config
            made = copy.deepcopy(config)
            made.debug.graph_dump.type = "pbtxt"
            made.debug.graph_dump.path = self._folder.name
        except Exception:  # a dump is not worth ending a training for
            log.debug("torchair writes no graphs", exc_info=True)
            return config
        for kind in ("original", "optimized"):
            self.graphs.pop(kind, None)
        self._waits = True
        return made

    def collect(self, ran: bool = False) -> None:
        """Collect the files that torchair has written. `ran`: after the first run, the last time."""
        if not self._waits:
            return
        self._waits = not ran
        found = sorted(pathlib.Path(self._folder.name).glob("dynamo_*.pbtxt"))
        for path in found:
            kind = "optimized" if path.name.startswith("dynamo_optimized") else "original"
            self.graphs[kind] = _ordered(path.read_text(encoding="utf-8"))
            path.unlink()
        if found and self._show is not None:
            self._show(self.graphs)


def _ordered(text: str) -> str:
    """Sort the attributes of every node by name: protobuf's maps are unordered."""
    lines: list[str] = []
    attributes: list[str] = []
    for line in text.splitlines():
        if line == "    attr {":
            attributes.append(line)
        elif line == "}":
            lines += [*sorted(attributes), line]
            attributes = []
        elif attributes:
            attributes[-1] += f"\n{line}"
        else:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)
