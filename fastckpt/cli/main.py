"""The command line, `fastckpt COMMAND` (docs/cli.md).

Data goes to stdout, messages to stderr; `--json` is a contract.

exit status
  0    done; nothing wrong
  1    check found damage, or something that it cannot vouch for; salvage could not get out everything; probe: no repository can be held
  2    wrong usage; or a question that nobody answered (--yes)
  3    no checkpoint, repository or recording, or damaged so that it cannot be read, or of another version
  4    the operating system or the store said no: no such file, permission denied, no answer
  130  interrupted
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from fastckpt._version import __version__
from fastckpt.cli.output import (
    BAD_CHECKPOINT,
    INTERRUPTED,
    OK,
    OS_ERROR,
    USAGE,
    WrongUsageError,
    note,
    print_json,
)
from fastckpt.cli.target import require_endpoint, require_environment
from fastckpt.errors import CheckpointError, StoreError


class Command(Protocol):
    """The interface of each command's module."""

    HELP: str
    """One line, for the list of commands and for its own help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments; --json was added before."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command. Returns the exit status; errors are raised."""


# In the order of the help. Each is a module of this room, and imported only when it is needed: some need torch, which takes a second.
COMMANDS = (
    "ls",
    "show",
    "check",
    "analyze",
    "probe",
    "prune",
    "restore",
    "salvage",
    "compact",
    "cp",
    "mirror",
    "prefetch",
    "trace",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv).parse_args(argv)
    try:
        require_environment()
        require_endpoint(getattr(arguments, "endpoint_url", None))
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except WrongUsageError as error:
        return _fail(arguments, USAGE, error)
    except StoreError as error:
        return _fail(arguments, OS_ERROR, error)
    except CheckpointError as error:
        return _fail(arguments, BAD_CHECKPOINT, error)
    except BrokenPipeError:  # `fastckpt show x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        return _fail(arguments, OS_ERROR, error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Parses the command that is named first; of all commands if that is none, for the help and the error."""
    parser = argparse.ArgumentParser(
        prog="fastckpt",
        description="Look at, check, thin out and rescue fastckpt checkpoints: files, and repositories (a directory or URL).",
        epilog=(__doc__ or "").partition("contract.\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastckpt {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    named = argv[:1] if argv and argv[0] in COMMANDS else COMMANDS
    for name in named:
        command = cast(Command, importlib.import_module(f"fastckpt.cli.{name}"))
        verb = verbs.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        verb.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")
        command.add_arguments(verb)
        verb.set_defaults(run=command.run)
    return parser


def _fail(arguments: argparse.Namespace, status: int, error: BaseException) -> int:
    if arguments.json:
        print_json("error", {"error": type(error).__name__, "message": str(error), "exit": status})
    note(f"fastckpt: {error}")
    return status
