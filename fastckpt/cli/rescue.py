"""restore and salvage: state out of a repository into files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from fastckpt.cli.output import FOUND_DAMAGE, OK, WrongUsageError, bar, human, note, print_json, say
from fastckpt.cli.target import find, local_path, options, safe_history
from fastckpt.errors import NoCheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.tensor_names import dotted
from fastckpt.repository.catalog import Catalog, Step
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.export import export
from fastckpt.upkeep.salvage import SalvagedRank, SalvageReport, report_to_json, salvage
from fastckpt.writing.sinks import open_sink


def restore(repository: Repository, arguments: argparse.Namespace) -> int:
    """One rank of a checkpoint as a container. CorruptCheckpointError names the newest complete step."""
    out = _local(arguments.out)
    _refuse_existing([out], arguments.force)
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder {folder} does not exist: make it first")
    catalog = Catalog(repository)
    choice = catalog.choose(_wanted(repository, catalog, arguments))
    if choice is None:
        raise NoCheckpointError(f"{repository.url} has no checkpoint yet: nothing was ever committed")
    commit = choice.commit
    sink = open_sink(out)
    n_bytes = export(repository, commit, arguments.rank, sink, options(), bar(out))
    checkpoint = {"epoch": commit.save.epoch, "step": commit.save.step, "rank": arguments.rank, "world": commit.world}
    if arguments.json:
        print_json("restore", {"url": repository.url, **checkpoint, "path": out, "container_bytes": n_bytes})
    else:
        where = f"epoch {commit.save.epoch}, step {commit.save.step}, rank {arguments.rank} of {commit.world}"
        say(f"{out}: {where}, {human(n_bytes)}; fastckpt.load reads it")
    if commit.world > 1 and not arguments.json:
        note(f"this is rank {arguments.rank} alone: --rank takes one of the others")
    return OK


def _wanted(repository: Repository, catalog: Catalog, arguments: argparse.Namespace) -> Step:
    """--step and --epoch for `Catalog.choose`."""
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


def _local(text: str) -> str:
    path = local_path(text)
    if path is None:
        raise WrongUsageError(f"--out is {text!r}: expected a path of this machine; upload what is written there")
    return str(path)


def _refuse_existing(paths: Iterable[str], force: bool) -> None:
    for path in paths:
        if os.path.lexists(path) and not force:
            raise WrongUsageError(f"{path} exists already: --force replaces it")


def rescue(repository: Repository, arguments: argparse.Namespace) -> int:
    """Everything that can still be read, into a folder. FOUND_DAMAGE if anything was lost."""
    out = _local(arguments.out)
    if os.path.isdir(out):
        _refuse_existing(map(str, Path(out).glob("rank-*.fckpt")), arguments.force)
        _refuse_existing([os.path.join(out, "report.json")], arguments.force)
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
    """Also a save that was never committed: a person asks for what is there."""
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


__all__ = ["rescue", "restore"]
