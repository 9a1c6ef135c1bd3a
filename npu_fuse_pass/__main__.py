"""`python -m npu_fuse_pass <command>`: what can be done from a terminal."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Sequence

# command -> what it does, in a line; the module of that name in `tools/commands` does it, loaded when it is asked for
COMMANDS: dict[str, str] = {
    "dump": "what a step becomes, as files and a page; why it is not fused; what changed between two dumps",
    "selftest": "check this machine: environment, numbers and times, into one report to attach to an issue",
}
# other name -> what it stands for
ALIASES: dict[str, list[str]] = {"doctor": ["dump", "--check", "--steps", "3"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 1 for what the command checks and finds wanting; argparse exits with 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = [*ALIASES.get(given[0], given[:1]), *given[1:]] if given else given
    parser = argparse.ArgumentParser(prog="python -m npu_fuse_pass", description=__doc__)
    parser.epilog = "\n".join(f"{name} is {' '.join(words)}" for name, words in ALIASES.items())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, purpose in COMMANDS.items():
        of_command = commands.add_parser(name, help=purpose, description=purpose)
        if given[:1] == [name]:
            _load(name).add_arguments(of_command)
    chosen = parser.parse_args(given)
    return int(_load(chosen.command).run(chosen))


def _load(name: str) -> types.ModuleType:
    return importlib.import_module(f"npu_fuse_pass.tools.commands.{name}")


if __name__ == "__main__":
    raise SystemExit(main())
