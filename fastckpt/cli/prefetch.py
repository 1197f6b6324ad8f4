"""prefetch: fetches what a restore will read into a folder of this machine, while Python and the devices start."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from fastckpt.cli.output import OK, WrongUsageError, bar, human, note, print_json, say
from fastckpt.cli.target import (
    add_checkpoint,
    add_endpoint,
    find,
    local_output,
    open_store_at,
    options,
    safe_history,
)
from fastckpt.errors import NoCheckpointError, RepositoryError
from fastckpt.format import keys
from fastckpt.options import Options, variable
from fastckpt.repository.catalog import Catalog, Which
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.upkeep.prefetch import PrefetchReport, prefetch

HELP = "fetch what a restore will read into a folder of this machine"

_VARIABLE = "FASTCKPT_CACHE_DIR"
_CONNECTIONS = 32
"""Unless FASTCKPT_CONNECTIONS says otherwise: while a machine starts, nothing else needs its link or its memory."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt prefetch`."""
    add_endpoint(parser)
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "--to", metavar="DIR", help=f"the folder; otherwise ${_VARIABLE}, from which a restore reads it"
    )
    add_checkpoint(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--rank", action="append", default=[], metavar="R|R-S", help="of these saved ranks alone; may be repeated"
    )
    who.add_argument("--all-ranks", action="store_true", help="of all saved ranks, which is the default")
    parser.add_argument(
        "--max-bytes", metavar="N[KMGT]", help="no more packs than this; otherwise half of the free disk"
    )
    parser.add_argument("--progress", action="store_true", help="draw a bar; on a terminal it is drawn anyway")


def run(arguments: argparse.Namespace) -> int:
    """Fetch. That there is no checkpoint yet is no error: a job's first start has none. StoreError, UnreadableError, OSError."""
    folder = arguments.to or os.environ.get(_VARIABLE, "")
    if not folder:
        raise WrongUsageError(f"where to? Give --to DIR, or set {_VARIABLE}: a restore reads what lies there")
    folder = local_output(folder)
    ranks = ranks_of(arguments.rank)
    most = None if arguments.max_bytes is None else bytes_of(arguments.max_bytes)
    with open_store_at(arguments.url, arguments.endpoint_url) as store:
        try:
            report = prefetch(
                store,
                folder,
                step=_which(store, arguments),
                ranks=ranks,
                most_bytes=most,
                options=_options(),
                progress=bar(folder, always=arguments.progress),
            )
        except (NoCheckpointError, RepositoryError) as error:
            if not _is_first_start(store, arguments):
                raise
            return _print_nothing(arguments, store, str(error))
    if arguments.json:
        print_json("prefetch", _to_json(report))
    else:
        _print(report)
    return OK


def _options() -> Options:
    """WrongUsageError."""
    found = options()
    return found if variable("connections") in os.environ else replace(found, connections=_CONNECTIONS)


def _which(store: Store, arguments: argparse.Namespace) -> Which:
    if arguments.epoch is None:
        return "latest" if arguments.step is None else int(arguments.step)
    catalog = Catalog(Repository(store))
    return find(store.url, safe_history(catalog), catalog.listing.commits, arguments.step, arguments.epoch)


def _is_first_start(store: Store, arguments: argparse.Namespace) -> bool:
    """Whether nothing was ever committed, and nothing was asked for by name."""
    named = arguments.step is not None or arguments.epoch is not None
    return not named and not any(keys.parse_commit(info.key) for info in store.list(keys.COMMITS))


def ranks_of(texts: list[str]) -> set[int] | None:
    """The ranks that --rank names; None: all. WrongUsageError."""
    found: set[int] = set()
    for text in texts:
        first, dash, last = text.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise WrongUsageError(f"--rank is {text!r}: expected a number, or two as in 0-7")
        if int(last or first) > keys.MAX_WORLD:
            raise WrongUsageError(f"--rank is {text!r}: expected at most {keys.MAX_WORLD}")
        found |= set(range(int(first), int(last or first) + 1))
    return found or None


def bytes_of(text: str) -> int:
    """A number of bytes, as in 500M. WrongUsageError."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    number = text[: len(text) - len(unit)]
    if unit not in _UNITS or not number.isdecimal():
        raise WrongUsageError(f"--max-bytes is {text!r}: expected a number of bytes, or as in 500M or 20G")
    return int(number) * _UNITS[unit]


def _print_nothing(arguments: argparse.Namespace, store: Store, words: str) -> int:
    if arguments.json:
        print_json("prefetch", {"url": store.url, "checkpoint": None, "notes": [words]})
    note(f"nothing was fetched: {words}")
    return OK


def _print(report: PrefetchReport) -> None:
    c = report.checkpoint
    sizes = f"{human(report.fetched_bytes)} fetched, {human(report.present_bytes)} were there"
    say(f"{report.folder}: epoch {c.epoch}, step {c.step} of {report.url}: {report.packs} packs, {sizes}")
    if report.left_bytes:
        note(f"{human(report.left_bytes)} are left to the store: there is no room for them")
    for words in report.notes:
        note(f"note: {words}")


def _to_json(report: PrefetchReport) -> dict[str, object]:
    return {
        "url": report.url,
        "folder": report.folder,
        "checkpoint": {"epoch": report.checkpoint.epoch, "step": report.checkpoint.step},
        "world": report.world,
        "packs": report.packs,
        "fetched_bytes": report.fetched_bytes,
        "present_bytes": report.present_bytes,
        "left_bytes": report.left_bytes,
        "notes": report.notes,
    }
