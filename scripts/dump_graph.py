"""The same as `python -m npu_fuse_pass dump`: what a step becomes, as files to read and a page."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from npu_fuse_pass.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["dump", *sys.argv[1:]]))
