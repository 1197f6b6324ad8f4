"""mirror: copies the checkpoints of a repository to another store, and cp: one of them, or a single file or object."""

from __future__ import annotations

import argparse
from typing import Any

from fastckpt.cli.output import FOUND_DAMAGE, OK, WrongUsageError, bar, human, note, print_json, say
from fastckpt.cli.target import add_endpoint, add_epoch, open_repository, open_store_at, options
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.mirror.mirror import mirror
from fastckpt.upkeep.mirror.plan import MirrorAsked, MirrorReport

HELP = "copy checkpoints of a repository to another store: only packs that are missing there travel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt mirror`."""
    add_places(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step alone")
    which.add_argument("--last", type=int, metavar="N", help="the newest N of the history; otherwise all of it")
    which.add_argument("--all", action="store_true", help="abandoned branches, too")
    add_epoch(parser)
    parser.add_argument("--prune", action="store_true", help="then retire at DST what SRC has retired")
    add_switches(parser)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add SRC, DST, and where they are."""
    add_endpoint(parser)
    parser.add_argument("--to-endpoint-url", metavar="URL", help="where an s3:// DST is, if not where SRC is")
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add --contents and --progress."""
    parser.add_argument(
        "--contents", action="store_true", help="read and compare what DST has already, and put damaged objects again"
    )
    parser.add_argument("--progress", action="store_true", help="draw a bar; on a terminal it is drawn anyway")


def run(arguments: argparse.Namespace) -> int:
    """Copy. RepositoryError, NoCheckpointError, StoreError, WrongUsageError, OSError."""
    if arguments.last is not None and arguments.last < 1:
        raise WrongUsageError(f"--last is {arguments.last}: expected a number ≥ 1")
    asked = MirrorAsked(
        step=arguments.step,
        epoch=arguments.epoch,
        last=arguments.last,
        branches=arguments.all,
        prune=arguments.prune,
        contents=arguments.contents,
    )
    with open_repository(arguments.source, arguments.endpoint_url) as source:
        return carry_out(source, asked, arguments, "mirror")


def carry_out(source: Repository, asked: MirrorAsked, arguments: argparse.Namespace, name: str) -> int:
    """Mirror to the target that the arguments name, and print what was done. Returns the exit status."""
    endpoint = arguments.to_endpoint_url or arguments.endpoint_url
    with open_store_at(arguments.target, endpoint) as target:
        report = mirror(source.store, target, asked, options(), bar(target.url, always=arguments.progress))
    if arguments.json:
        print_json(name, _to_json(report))
    else:
        _print(report)
    return FOUND_DAMAGE if report.failed else OK


def _print(report: MirrorReport) -> None:
    url = report.target
    for checkpoint in report.copied:
        say(f"{url}: epoch {checkpoint.epoch}, step {checkpoint.step}: copied")
    for checkpoint in report.retired:
        say(f"{url}: epoch {checkpoint.epoch}, step {checkpoint.step}: retired, as at the source")
    sent = f"{report.sent_objects} objects, {human(report.sent_bytes)} sent"
    say(f"{url}: {len(report.copied)} checkpoints copied, {len(report.present)} were there; {sent}")
    for checkpoint, why in report.left_out:
        note(f"{url}: epoch {checkpoint.epoch}, step {checkpoint.step} is left out: {why}")
    for key in report.replaced:
        note(f"{url}: {key} was damaged, and was put again")
    for words in report.notes:
        note(f"{url}: note: {words}")
    for checkpoint, error in report.failed:
        note(f"{url}: epoch {checkpoint.epoch}, step {checkpoint.step} was not copied: {error}")


def _to_json(report: MirrorReport) -> dict[str, Any]:
    def places(checkpoints: list[Any]) -> list[dict[str, int]]:
        return [{"epoch": c.epoch, "step": c.step} for c in checkpoints]

    return {
        "source": report.source,
        "target": report.target,
        "origin": report.origin,
        "repository": report.repository,
        "copied": places(report.copied),
        "present": places(report.present),
        "retired": places(report.retired),
        "left_out": [{"epoch": c.epoch, "step": c.step, "why": why} for c, why in report.left_out],
        "failed": [
            {"epoch": c.epoch, "step": c.step, "error": type(e).__name__, "message": str(e)} for c, e in report.failed
        ],
        "replaced": report.replaced,
        "sent_objects": report.sent_objects,
        "sent_bytes": report.sent_bytes,
        "notes": report.notes,
    }
