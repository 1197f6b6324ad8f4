"""The command line: fastckpt ls | show | check | analyze | prune | restore | salvage | trace (docs/cli.md).

Data goes to stdout, talk to stderr; `--json` is a contract.

exit status
  0    done; nothing wrong
  1    check found damage, or something that it cannot vouch for; salvage could not get out everything
  2    wrong usage; or a question that nobody answered (--yes)
  3    no checkpoint, repository or recording, or damaged so that it cannot be read, or of another version
  4    the operating system or the store said no: no such file, permission denied, no answer
  130  interrupted
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from fastckpt._version import __version__
from fastckpt.cli import analysis, containers, pruning, repositories, rescue, tracing
from fastckpt.cli.output import (
    BAD_CHECKPOINT,
    FOUND_DAMAGE,
    INTERRUPTED,
    OK,
    OS_ERROR,
    USAGE,
    WrongUsageError,
    note,
    print_json,
)
from fastckpt.cli.target import (
    add_checkpoint,
    add_endpoint,
    add_epoch,
    local_path,
    maybe_repository,
    open_repository,
    require_endpoint,
    require_environment,
)
from fastckpt.errors import CheckpointError, StoreError
from fastckpt.repository.repository import Repository


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastckpt",
        description="Look at, check, thin out and rescue fastckpt checkpoints: files, and repositories (a directory or s3:// URL).",
        epilog=(__doc__ or "").partition("contract.\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastckpt {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def verb(name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=words, description=words, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")
        if name != "trace":  # reads no store
            add_endpoint(sub)
        sub.set_defaults(run=run)
        return sub

    ls = verb("ls", _ls, "list the checkpoints of repositories, in folders, or the given files")
    ls.add_argument("paths", nargs="*", default=["."], metavar="PATH")
    show = verb("show", _show, "show a checkpoint and list its tensors; reads its index only")
    show.add_argument("path", metavar="FILE|URL")
    add_checkpoint(show)
    check = verb("check", _check, "read and verify every byte; names everything that is damaged")
    check.add_argument("paths", nargs="+", metavar="FILE|URL")
    check.add_argument("--step", type=int, metavar="N", help="of a repository: checkpoints of this step only")
    check.add_argument(
        "--quick", action="store_true", help="of a repository: records and indexes, packs by length only"
    )
    check.add_argument(
        "--repair", action="store_true", help="then commit saves whose votes are all there (shows them, and asks)"
    )
    check.add_argument("--yes", action="store_true", help="do not ask")
    analyze = verb("analyze", analysis.run, "what compression and deltas would gain on this state; writes nothing")
    analyze.add_argument(
        "path", metavar="FILE|URL", help="of fastckpt, torch.save or safetensors; of a repository the newest checkpoint"
    )
    analyze.add_argument("--against", metavar="OLDER", help="an older state, to see what a delta would gain")
    analyze.add_argument(
        "--trust-pickle", action="store_true", help="load files that weights_only refuses: runs their code"
    )
    prune = verb("prune", _prune, "remove checkpoints that no rule keeps, and debris; shows its plan first")
    prune.add_argument("url", metavar="URL")
    prune.add_argument("--keep-last", type=int, required=True, metavar="N", help="keep the newest N of the history")
    prune.add_argument("--keep-every", type=int, metavar="K", help="keep steps that are multiples of K")
    prune.add_argument("--keep-best", metavar="METRIC:min|max", help="keep the one with the best value of a metric")
    prune.add_argument("--branches", action="store_true", help="remove abandoned branches too")
    prune.add_argument(
        "--run-is-stopped", action="store_true", help="no job writes here, by your word; required unless --dry-run"
    )
    prune.add_argument(
        "--grace",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="leave packs this long after their tombstone (default 0)",
    )
    prune.add_argument("--dry-run", action="store_true", help="show the plan only")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    # argparse knows no "one of them, or both".
    prune.usage = (
        "%(prog)s [-h] [--json] [--endpoint-url URL] --keep-last N [--keep-every K] [--keep-best METRIC:min|max]\n"
        "                      [--branches] [--grace SECONDS] (--run-is-stopped | --dry-run) [--yes] URL"
    )
    restore = verb("restore", _restore, "write one rank of a checkpoint as a file that fastckpt.load reads")
    restore.add_argument("url", metavar="URL")
    add_checkpoint(restore)
    restore.add_argument("--rank", type=int, default=0, metavar="R", help="which rank (default 0)")
    restore.add_argument("--out", required=True, metavar="FILE")
    restore.add_argument("--force", action="store_true", help="replace the file")
    salvage = verb(
        "salvage", _salvage, "write every tensor of a damaged checkpoint that verifies, and report the others"
    )
    salvage.add_argument("url", metavar="URL")
    salvage.add_argument(
        "step", type=int, nargs="?", metavar="STEP", help="the checkpoint of this step (default: the newest)"
    )
    add_epoch(salvage)
    salvage.add_argument("--rank", type=int, metavar="R", help="one rank only")
    salvage.add_argument("--out", required=True, metavar="DIR")
    salvage.add_argument("--force", action="store_true", help="replace files of an earlier salvage")
    trace = verb("trace", tracing.run, "show where the time of recorded saves went: a timeline, a picture, a table")
    tracing.add_arguments(trace)
    return parser


def _fail(arguments: argparse.Namespace, status: int, error: BaseException) -> int:
    if arguments.json:
        print_json("error", {"error": type(error).__name__, "message": str(error), "exit": status})
    note(f"fastckpt: {error}")
    return status


def _ls(arguments: argparse.Namespace) -> int:
    files, found = [], []
    for text in arguments.paths:
        with maybe_repository(text, arguments.endpoint_url) as repository:
            if repository is not None:
                found.append(repositories.list_repository(repository))
            elif local_path(text) is None:
                with open_repository(text, arguments.endpoint_url):  # says that it is none
                    pass
            else:
                files += containers.list_files(text)
    if arguments.json:
        print_json("ls", {"checkpoints": files, "repositories": found})
        return OK
    for one in found:
        if len(arguments.paths) > 1:
            note(one["url"])
        repositories.print_repository(one)
    if files:
        containers.print_files(files)
    elif not found:
        note("no checkpoints here")
    return OK


def _show(arguments: argparse.Namespace) -> int:
    with maybe_repository(arguments.path, arguments.endpoint_url) as repository:
        if repository is not None:
            return repositories.show(repository, arguments)
    if arguments.step is not None or arguments.epoch is not None:
        raise WrongUsageError(f"--step and --epoch are for repositories, and {arguments.path} is none")
    return containers.show(arguments)


def _check(arguments: argparse.Namespace) -> int:
    reports, errors, checked = [], [], []
    for path in arguments.paths:
        try:
            with maybe_repository(path, arguments.endpoint_url) as repository:
                if repository is not None:
                    checked.append(repositories.check(repository, arguments))
                    continue
            reports.append(containers.check(path, arguments.endpoint_url))
        except StoreError:
            raise
        except CheckpointError as error:  # the others are still worth checking
            errors.append((path, error))
    if arguments.json:
        failed = [{"path": path, "error": type(e).__name__, "message": str(e)} for path, e in errors]
        value = {"checked": [containers.report_to_json(report) for report in reports], "failed": failed}
        print_json("check", {**value, "repositories": [repositories.checked_to_json(one) for one in checked]})
    else:
        for report in reports:
            containers.print_report(report)
        for _, failure in errors:
            note(f"fastckpt: {failure}")
    if errors:
        return BAD_CHECKPOINT
    if any(one.unanswered for one in checked):
        return USAGE
    if any(one.status == FOUND_DAMAGE for one in checked) or not all(report.ok for report in reports):
        return FOUND_DAMAGE
    return BAD_CHECKPOINT if any(one.status != OK for one in checked) else OK


def _in_repository(run: Callable[[Repository, argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    with open_repository(arguments.url, arguments.endpoint_url) as repository:
        return run(repository, arguments)


def _prune(arguments: argparse.Namespace) -> int:
    return _in_repository(pruning.prune, arguments)


def _restore(arguments: argparse.Namespace) -> int:
    return _in_repository(rescue.restore, arguments)


def _salvage(arguments: argparse.Namespace) -> int:
    return _in_repository(rescue.rescue, arguments)
