"""salvage: writes everything that can still be read of a damaged checkpoint to files."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastckpt.cli.output import FOUND_DAMAGE, OK, bar, human, note, print_json, say
from fastckpt.cli.target import (
    add_endpoint,
    add_epoch,
    find,
    local_output,
    open_repository,
    options,
    refuse_existing,
    safe_history,
)
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.tensor_names import dotted
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.salvage import SalvagedRank, SalvageReport, report_to_json, salvage

HELP = "write every tensor of a damaged checkpoint that verifies, and report the others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt salvage`."""
    add_endpoint(parser)
    parser.add_argument("url", metavar="URL")
    parser.add_argument(
        "step", type=int, nargs="?", metavar="STEP", help="the checkpoint of this step (default: the newest)"
    )
    add_epoch(parser)
    parser.add_argument("--rank", type=int, metavar="R", help="one rank only")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="replace files of an earlier salvage")


def run(arguments: argparse.Namespace) -> int:
    """Write the files. The status is FOUND_DAMAGE if anything was lost. NoCheckpointError, StoreError, OSError."""
    with open_repository(arguments.url, arguments.endpoint_url) as repository:
        return _salvage(repository, arguments)


def _salvage(repository: Repository, arguments: argparse.Namespace) -> int:
    out = local_output(arguments.out)
    if os.path.isdir(out):
        refuse_existing(map(str, Path(out).glob("rank-*.fckpt")), arguments.force)
        refuse_existing([os.path.join(out, "report.json")], arguments.force)
    catalog = Catalog(repository)
    checkpoint = _any(repository, catalog, arguments)
    ranks = None if arguments.rank is None else [arguments.rank]
    report = salvage(repository, checkpoint, out, ranks=ranks, options=options(), progress=bar(out))
    if arguments.json:
        print_json("salvage", report_to_json(report))
    else:
        for rank in report.ranks:
            _print_rank(rank)
    _say_what_was_lost(report)
    return OK if report.nothing_lost else FOUND_DAMAGE


def _any(repository: Repository, catalog: Catalog, arguments: argparse.Namespace) -> CheckpointId:
    """The chosen checkpoint, or a save that was never committed: the user wants whatever is there."""
    votes = {vote.save for info in repository.store.list(keys.VOTES) if (vote := keys.parse_vote(info.key)) is not None}
    known = {*catalog.listing.commits, *(save.checkpoint for save in votes)}
    return find(repository.url, safe_history(catalog), sorted(known), arguments.step, arguments.epoch)


def _print_rank(rank: SalvagedRank) -> None:
    if rank.file is not None:
        say(
            f"{rank.file}: {len(rank.saved)} tensors, {human(rank.saved_bytes)}; fastckpt.load gives a dictionary of them"
        )
    else:
        say(f"rank {rank.rank}: nothing could be saved")


def _say_what_was_lost(report: SalvageReport) -> None:
    checkpoint = f"epoch {report.checkpoint.epoch}, step {report.checkpoint.step}"
    if report.commit != "whole":
        note(f"fastckpt: the commit record of {checkpoint} is not right: {report.commit}")
    for rank in report.ranks:
        for words in rank.notes:
            note(f"fastckpt: rank {rank.rank}: {words}")
        if rank.lost_whole:
            note(f"fastckpt: rank {rank.rank}: its index is lost, so nothing of it can be read")
        for tensor in rank.lost:
            found = tensor.found_in
            where = (
                "nowhere else"
                if found is None
                else f"whole in epoch {found.checkpoint.epoch}, step {found.checkpoint.step}"
            )
            name = dotted(tensor.name)
            why = "" if tensor.assumed else f" ({tensor.why[0]})"
            assumed = ", which it must have had" if tensor.assumed else ""
            note(f"fastckpt: rank {rank.rank}: LOST: {name}{assumed}{why}; {where}".replace("\n", " "))
    if report.nothing_lost:
        note(f"nothing of {checkpoint} is lost: `fastckpt restore` gives the whole object, not its tensors alone")
