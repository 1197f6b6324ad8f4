"""compact: writes a checkpoint once more, in full, so that it needs nothing of earlier saves."""

from __future__ import annotations

import argparse
from dataclasses import replace

from fastckpt.cli.output import OK, WrongUsageError, bar, human, note, print_json, say
from fastckpt.cli.target import add_endpoint, add_epoch, find, open_repository, open_store_at, options, safe_history
from fastckpt.options import EFFORTS, Options
from fastckpt.repository.catalog import Catalog, Which
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.compact.elsewhere import compact_to
from fastckpt.upkeep.compact.in_place import compact_in_place
from fastckpt.upkeep.compact.report import CompactReport

HELP = "write a checkpoint once more, in full: it then needs no pack of an earlier save"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt compact`."""
    add_endpoint(parser)
    parser.add_argument("--to-endpoint-url", metavar="URL", help="where an s3:// --to is, if not where URL is")
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "step", type=int, nargs="?", metavar="STEP", help="the checkpoint of this step (default: the newest)"
    )
    add_epoch(parser)
    parser.add_argument(
        "--to", metavar="URL", help="into another repository, under its own name; a job may go on at the source"
    )
    parser.add_argument(
        "--run-is-stopped", action="store_true", help="without --to: confirm that no job runs, or starts meanwhile"
    )
    parser.add_argument(
        "--rewind", action="store_true", help="without --to: also if newer ones leave the history by that"
    )
    parser.add_argument(
        "--effort", choices=EFFORTS, help="of the encoder; then a full checkpoint is written again, too"
    )
    parser.add_argument("--progress", action="store_true", help="draw a bar; on a terminal it is drawn anyway")


def run(arguments: argparse.Namespace) -> int:
    """Compact. WrongUsageError, RepositoryError, NoCheckpointError, CorruptCheckpointError, StoreError, OSError."""
    if arguments.to is None and not arguments.run_is_stopped:
        raise WrongUsageError(
            "a checkpoint that is written again where it is needs an epoch of its own, and that ends a job which still saves there. If the "
            "run is stopped, confirm that with --run-is-stopped; while it runs, write into another repository with --to URL"
        )
    if arguments.to is not None and (arguments.run_is_stopped or arguments.rewind):
        raise WrongUsageError("--run-is-stopped and --rewind are for compacting in place: leave them out with --to")
    found = options() if arguments.effort is None else replace(options(), effort=arguments.effort)
    with open_repository(arguments.url, arguments.endpoint_url) as repository:
        report = _compact(repository, arguments, found)
    for words in report.notes:
        note(f"{report.target}: note: {words}")
    if arguments.json:
        print_json("compact", _to_json(report))
    else:
        _print(report)
    return OK


def _compact(repository: Repository, arguments: argparse.Namespace, found: Options) -> CompactReport:
    always = arguments.effort is not None
    if arguments.to is None:
        step = _wanted(repository, arguments)
        draw = bar(repository.url, always=arguments.progress)
        return compact_in_place(
            repository.store, step, rewind=arguments.rewind, always=always, options=found, progress=draw
        )
    endpoint = arguments.to_endpoint_url or arguments.endpoint_url
    with open_store_at(arguments.to, endpoint) as target:
        draw = bar(target.url, always=arguments.progress)
        return compact_to(
            repository.store, target, step=arguments.step, epoch=arguments.epoch, options=found, progress=draw
        )


def _wanted(repository: Repository, arguments: argparse.Namespace) -> Which:
    if arguments.epoch is None:
        return "latest" if arguments.step is None else int(arguments.step)
    catalog = Catalog(repository)
    return find(repository.url, safe_history(catalog), catalog.listing.commits, arguments.step, arguments.epoch)


def _print(report: CompactReport) -> None:
    read, now = report.checkpoint, report.compacted
    where = f"{report.target}: epoch {now.epoch}, step {now.step}"
    if not report.written:
        say(f"{where} is full already: {human(report.stored_bytes)}. Nothing was written")
        return
    of = "" if report.target == report.source and read == now else f" of epoch {read.epoch}, step {read.step}"
    say(f"{where}: written in full{of}: {human(report.stored_bytes)} for {human(report.raw_bytes)} of state")


def _to_json(report: CompactReport) -> dict[str, object]:
    return {
        "source": report.source,
        "target": report.target,
        "read": report.checkpoint._asdict(),
        "compacted": report.compacted._asdict(),
        "written": report.written,
        "world": report.world,
        "raw_bytes": report.raw_bytes,
        "stored_bytes": report.stored_bytes,
        "notes": report.notes,
    }
