"""ls: the checkpoints of repositories, the containers in folders, or given files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastckpt.cli.output import OK, human, note, print_json, table
from fastckpt.cli.target import add_endpoint, local_path, maybe_repository, open_repository, safe_history
from fastckpt.errors import CheckpointError, NotACheckpointError, UnreadableError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit, metrics_to_json
from fastckpt.reading.chunk_reader import Reader, is_container, summary
from fastckpt.reading.sources import PathSource
from fastckpt.repository.catalog import Catalog, describe, pending_saves
from fastckpt.repository.commit import list_votes
from fastckpt.repository.file_tables import packs_of
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.known_records import KnownRecords
from fastckpt.repository.record_reader import AllCommits
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import held_bytes
from fastckpt.upkeep.references import references

HELP = "list the checkpoints of repositories, in folders, or the given files"

_MANY_METRICS = 4
_NUMBERS = ("epoch", "step", "ranks", "size", "of earlier", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt ls`."""
    add_endpoint(parser)
    parser.add_argument("paths", nargs="*", default=["."], metavar="PATH")


def run(arguments: argparse.Namespace) -> int:
    """List all checkpoints. A damaged one gets a row that says so."""
    files, found = [], []
    for text in arguments.paths:
        with maybe_repository(text, arguments.endpoint_url) as repository:
            if repository is not None:
                found.append(list_repository(repository))
            elif local_path(text) is None:
                with open_repository(text, arguments.endpoint_url):  # raises the error that it is none
                    pass
            else:
                files += _list_files(text)
    if arguments.json:
        print_json("ls", {"checkpoints": files, "repositories": found})
        return OK
    for one in found:
        if len(arguments.paths) > 1:
            note(one["url"])
        _print_repository(one)
    if files:
        _print_files(files)
    elif not found:
        note("no checkpoints here")
    return OK


# Repositories.


def list_repository(repository: Repository) -> dict[str, Any]:
    """A member of `repositories` of `fastckpt.ls/1`, newest checkpoint first. Reads names, records with one request each, and of the newest
    some hundred votes one range, or two.
    """
    records = KnownRecords(repository.store)
    catalog = Catalog(records)
    found = records.read_all(catalog.listing)
    inside = safe_history(catalog)
    newest_first = sorted(found.commits.values(), key=lambda commit: commit.save, reverse=True)
    earlier = references(repository.store, newest_first)
    rows = [
        {**commit_row(commit, inside), "earlier_bytes": earlier.get(checkpoint)}
        for checkpoint, commit in found.commits.items()
    ]
    for checkpoint, error in found.failed.items():
        rows.append(_empty_row(checkpoint, "damaged", str(error)))
    for save in pending_saves(repository.store, catalog.listing):
        votes = list_votes(repository.store, save)
        if votes:
            words = f"votes of {len({v.rank for v in votes})} of {votes[0].world} ranks"
            rows.append({**_empty_row(save.checkpoint, "unfinished", words), "try": save.attempt})
    rows.sort(key=lambda row: (row["epoch"], row["step"], row["try"] or 0), reverse=True)
    newest = max(catalog.listing.epochs, default=0)
    return {
        "url": repository.url,
        "origin": _origin(repository),
        "newest_epoch": newest,
        "retired": len(found.tombstones),
        **_held(repository, found),
        "checkpoints": rows,
    }


def _held(repository: Repository, found: AllCommits) -> dict[str, int]:
    """Bytes of packs, and what remains of saves that are no checkpoints any more: only then file tables are read."""
    data = take_inventory(repository.store, keys.DATA)
    useless = {
        save
        for save in data.packs
        if save.checkpoint in found.tombstones
        or (save.checkpoint in found.commits and found.commits[save.checkpoint].save != save)
    }
    needed: set[str] | None = set()
    try:
        if useless:
            needed = {key for commit in found.commits.values() for key in packs_of(repository.store, commit)}
    except UnreadableError:
        needed = None
    held = held_bytes(data.packs, data.sizes, None if found.failed else needed, useless)
    return {"stored_bytes": held.stored, "base_bytes": held.base, "grace_bytes": held.grace}


def _origin(repository: Repository) -> dict[str, str] | None:
    """What the repository is a copy of; None for one that is none, or whose marker cannot be read."""
    try:
        marker = repository.marker()
    except UnreadableError:
        return None
    if marker is None or marker.origin is None:
        return None
    return {"repository": marker.origin.repository, "url": marker.origin.url}


def commit_row(commit: Commit, inside: list[CheckpointId] | None) -> dict[str, Any]:
    """The row of a checkpoint in `ls` and `show`. inside: the history; None if it cannot be known."""
    checkpoint = commit.checkpoint
    branch = "unknown" if inside is None else "history" if checkpoint in inside else "abandoned"
    row = {**describe(commit), "metrics": metrics_to_json(commit.metrics), "branch": branch, "error": None}
    return {**row, "newest": bool(inside) and inside is not None and inside[0] == checkpoint}


def _empty_row(checkpoint: CheckpointId, branch: str, error: str) -> dict[str, Any]:
    return {
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "try": None,
        "branch": branch,
        "newest": False,
        "error": error,
    }


def _print_repository(found: Mapping[str, Any]) -> None:
    if found["origin"] is not None:
        note(f"{found['url']}: a copy of {found['origin']['url']}")
    if not found["checkpoints"]:
        note(f"{found['url']}: no checkpoints")
        return
    shows_ranks = any(one["error"] is None and one["world"] > 1 for one in found["checkpoints"])
    shows_earlier = any(one["error"] is None and one["earlier_bytes"] for one in found["checkpoints"])
    ranks, of_earlier = ["ranks"] if shows_ranks else [], ["of earlier"] if shows_earlier else []
    head = ["epoch", "step", *ranks, "when (UTC)", "size", *of_earlier, "state", "trigger", "metrics", ""]
    rows: list[list[object]] = [[*head]]
    for one in found["checkpoints"]:
        if one["error"] is None:
            when = one["utc"].replace("T", " ").removesuffix("Z")
            needed = [_earlier(one["earlier_bytes"])] if shows_earlier else []
            sizes = [human(one["stored_bytes"]), *needed, human(one["raw_bytes"])]
            mark = "newest" if one["newest"] else "" if one["branch"] == "history" else one["branch"]
            ranks = [one["world"]] if shows_ranks else []
            rows.append(
                [one["epoch"], one["step"], *ranks, when, *sizes, one["trigger"], _metrics(one["metrics"]), mark]
            )
        else:
            words = one["error"] if one["branch"] == "unfinished" else "see fastckpt check"
            nothing = [""] * (len(head) - 3)
            rows.append([one["epoch"], one["step"], *nothing, f"{one['branch']}: {words}"])
    table(rows, right=[i for i, name in enumerate(head) if name in _NUMBERS])
    if found["base_bytes"] or found["grace_bytes"]:
        stored, base, grace = (human(found[name]) for name in ("stored_bytes", "base_bytes", "grace_bytes"))
        note(
            f"{found['url']}: packs of {stored}; of saves that are no checkpoint any more {base}, to which checkpoints refer, and {grace}, "
            "which wait for the end of their grace"
        )


def _earlier(n_bytes: int | None) -> str:
    return "" if n_bytes is None else human(n_bytes) if n_bytes else "full"


def _metrics(metrics: Mapping[str, Any]) -> str:
    shown = [
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in metrics.items()
    ]
    return " ".join(shown[:_MANY_METRICS]) + (" …" if len(shown) > _MANY_METRICS else "")


# Files.


def _list_files(text: str) -> list[dict[str, Any]]:
    """Members of `checkpoints` of `fastckpt.ls/1`: a file, or each container in a folder."""
    path = Path(text)
    paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    found: list[dict[str, Any]] = []
    for item in paths:
        if not _is_container(item):
            if path.is_dir():
                continue
            raise NotACheckpointError(f"{item} is no fastckpt container")
        source = PathSource(str(item))
        try:
            found.append({"path": str(item), "error": None, **summary(Reader.open(source, alone=True))})
        except CheckpointError as error:
            found.append({"path": str(item), "error": str(error)})
        finally:
            source.close()
    return found


def _print_files(found: list[dict[str, Any]]) -> None:
    rows = [["file", "size", "state", "tensors", ""]]
    for one in found:
        if one["error"] is None:
            sizes = [human(one["container_bytes"]), human(one["raw_bytes"]), str(one["tensors"]), ""]
        else:
            sizes = ["", "", "", "damaged or unsupported: see fastckpt check"]
        rows.append([one["path"], *sizes])
    table(rows, right=(1, 2, 3))


def _is_container(path: Path) -> bool:
    source = PathSource(str(path))
    try:
        return is_container(source)
    finally:
        source.close()
