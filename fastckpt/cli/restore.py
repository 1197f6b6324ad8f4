"""restore: writes one rank of a checkpoint of a repository as a file that fastckpt.load reads."""

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
from fastckpt.errors import NoCheckpointError
from fastckpt.repository.catalog import Catalog, Which
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.export import export_to

HELP = "write one rank of a checkpoint as a file that fastckpt.load reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt restore`."""
    add_endpoint(parser)
    parser.add_argument("url", metavar="URL")
    add_checkpoint(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which rank (default 0)")
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
    n_bytes = export_to(out, repository, commit, arguments.rank, options(), bar(out))
    checkpoint = {"epoch": commit.save.epoch, "step": commit.save.step, "rank": arguments.rank, "world": commit.world}
    if arguments.json:
        print_json("restore", {"url": repository.url, **checkpoint, "path": out, "container_bytes": n_bytes})
    else:
        where = f"epoch {commit.save.epoch}, step {commit.save.step}, rank {arguments.rank} of {commit.world}"
        say(f"{out}: {where}, {human(n_bytes)}; fastckpt.load reads it")
    if commit.world > 1 and not arguments.json:
        note(f"this is rank {arguments.rank} alone: --rank takes one of the others")
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
