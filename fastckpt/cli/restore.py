"""restore: writes a checkpoint of a repository, or what one rank of it had, as a file that fastckpt.load reads."""

from __future__ import annotations

import argparse
import os

from fastckpt.cli.output import OK, bar, human, note, print_json, say
from fastckpt.cli.target import (
    add_checkpoint,
    add_endpoint,
    find,
    local_output,
    open_repository,
    options,
    refuse_existing,
    safe_history,
)
from fastckpt.errors import CorruptCheckpointError, NoCheckpointError
from fastckpt.repository.catalog import Catalog, Which
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.export import export_to
from fastckpt.upkeep.export_whole import export_whole_to

HELP = "write a checkpoint, or one rank of it, as a file that fastckpt.load reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt restore`."""
    add_endpoint(parser)
    parser.add_argument("url", metavar="URL")
    add_checkpoint(parser)
    parser.add_argument(
        "--rank", type=int, metavar="R", help="what this rank had, parts of DTensors; otherwise all of them, whole"
    )
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--force", action="store_true", help="replace the file")


def run(arguments: argparse.Namespace) -> int:
    """Write the file. CorruptCheckpointError names the newest complete step; NoCheckpointError, StoreError, OSError."""
    with open_repository(arguments.url, arguments.endpoint_url) as repository:
        return _restore(repository, arguments)


def _restore(repository: Repository, arguments: argparse.Namespace) -> int:
    out = local_output(arguments.out)
    refuse_existing([out], arguments.force)
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder {folder} does not exist: make it first")
    catalog = Catalog(repository)
    choice = catalog.choose(_wanted(repository, catalog, arguments))
    if choice is None:
        raise NoCheckpointError(f"{repository.url} has no checkpoint yet: nothing was ever committed")
    commit = choice.commit
    words = ""
    rank = None if arguments.rank is None and commit.world > 1 else arguments.rank or 0
    try:
        if rank is None:
            n_bytes, words = export_whole_to(out, repository, commit, options(), bar(out))
            which = f"{commit.world} ranks as one"
        else:
            n_bytes = export_to(out, repository, commit, rank, options(), bar(out))
            which = f"rank {rank} of {commit.world}"
    except CorruptCheckpointError as error:
        raise catalog.with_advice(commit.checkpoint, error) from error
    checkpoint = {"epoch": commit.save.epoch, "step": commit.save.step, "rank": rank, "world": commit.world}
    if arguments.json:
        print_json("restore", {"url": repository.url, **checkpoint, "path": out, "container_bytes": n_bytes})
        return OK
    say(f"{out}: epoch {commit.save.epoch}, step {commit.save.step}, {which}, {human(n_bytes)}; fastckpt.load reads it")
    if words:
        note(f"{words[0].upper()}{words[1:]}. --rank writes what one rank had")
    elif rank is not None and commit.world > 1:
        note(f"this is rank {rank} alone: without --rank, tensors of all ranks are written, whole")
    return OK


def _wanted(repository: Repository, catalog: Catalog, arguments: argparse.Namespace) -> Which:
    """The argument of `Catalog.choose` for --step and --epoch."""
    if arguments.epoch is None and arguments.step is None:
        others = catalog.branches() if not safe_history(catalog) else []
        if not others:
            return "latest"
        newest = others[0]
        note(
            f"the newest epoch has no checkpoint yet (begun with fresh=True): step {newest.step} of epoch {newest.epoch} is taken"
        )
        return newest
    if arguments.epoch is None:
        return int(arguments.step)
    return find(repository.url, safe_history(catalog), catalog.listing.commits, arguments.step, arguments.epoch)
