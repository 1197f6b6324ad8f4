"""show: one checkpoint and its tensors, from its index alone."""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from fastckpt.cli.ls import commit_row
from fastckpt.cli.output import BAD_CHECKPOINT, OK, WrongUsageError, human, note, print_json, say, table
from fastckpt.cli.target import add_checkpoint, add_endpoint, find, maybe_repository, open_container, safe_history
from fastckpt.errors import MissingObjectError, UnreadableError
from fastckpt.format.directory import TensorEntry
from fastckpt.format.keys import CheckpointId
from fastckpt.format.records import transform_of
from fastckpt.format.repository_records import Commit, Tombstone
from fastckpt.format.shares import owners_needed
from fastckpt.format.tensor_names import dotted, to_json
from fastckpt.format.vote import save_info
from fastckpt.format.wholes import Wholes
from fastckpt.reading.chunk_reader import Reader, storage_bytes, summary
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.stored_as import StoredAs, stored_as

HELP = "show a checkpoint and list its tensors; reads its index only"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt show`."""
    add_endpoint(parser)
    parser.add_argument("path", metavar="FILE|URL")
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show what is at a path or URL. WrongUsageError, CheckpointError, StoreError, OSError."""
    with maybe_repository(arguments.path, arguments.endpoint_url) as repository:
        if repository is not None:
            return _show_repository(repository, arguments)
    if arguments.step is not None or arguments.epoch is not None:
        raise WrongUsageError(f"--step and --epoch are for repositories, and {arguments.path} is none")
    return _show_container(arguments)


# Repositories.


def _show_repository(repository: Repository, arguments: argparse.Namespace) -> int:
    """A commit record, its ranks and their tensors. If something cannot be read, that is printed, and the status is BAD_CHECKPOINT."""
    catalog = Catalog(repository)
    inside = safe_history(catalog)
    checkpoint = find(repository.url, inside, _living(catalog), arguments.step, arguments.epoch)
    commit = repository.commit(checkpoint)
    assert isinstance(commit, Commit)
    wholes = Wholes(lambda name, entry: False)  # which blocks there are, nobody asks
    ranks = [_rank(repository, commit, rank, wholes) for rank in range(commit.world)]
    row = {**commit_row(commit, inside), "dtensors": sum(whole.was_spread for whole in wholes.found.values())}
    stored = StoredAs()
    for rank in ranks:
        if rank["error"] is None:
            stored.add(rank.pop("stored_as"))
    if arguments.json:
        value = {"url": repository.url, **row, "writer": commit.writer, **_stored_to_json(stored), "ranks": ranks}
        print_json("show-repository", value)
    else:
        _print_commit(repository, row, commit, _layout(commit, wholes), _read_words(stored))
        _print_transforms(stored)
        _print_ranks(ranks)
    broken = [rank for rank in ranks if rank["error"] is not None]
    for rank in broken:
        note(f"fastckpt: rank {rank['rank']} cannot be shown: {rank['error']}")
    return BAD_CHECKPOINT if broken else OK


def _living(catalog: Catalog) -> list[CheckpointId]:
    """Checkpoints that are not retired, damaged ones included."""
    found = []
    for checkpoint in catalog.listing.commits:
        try:
            if isinstance(catalog.commit(checkpoint), Tombstone):
                continue
        except MissingObjectError:
            continue
        except UnreadableError:
            pass
        found.append(checkpoint)
    return found


def _layout(commit: Commit, wholes: Wholes) -> str:
    n_spread = sum(whole.was_spread for whole in wholes.found.values())
    if not n_spread:
        return ""
    return f"{commit.world} ranks, {n_spread} of {len(wholes.found)} names are DTensors: their parts are listed below"


def _rank(repository: Repository, commit: Commit, rank: int, wholes: Wholes) -> dict[str, Any]:
    name = commit.vote(rank)
    try:
        reader = open_vote(repository.store, name)
        info = save_info(reader.directory, name, reader.source.name)
    except UnreadableError as error:
        return {"rank": rank, "error": str(error)}
    wholes.add(rank, reader.directory)
    stored = stored_as(reader, commit.save)
    return {
        "rank": rank,
        "error": None,
        "raw_bytes": info.raw_bytes,
        "held_bytes": storage_bytes(reader),
        "owners": sorted(owners_needed(reader.directory)),
        "stored_bytes": info.stored_bytes,
        "shared_bytes": stored.earlier_bytes,
        "read_bytes": stored.read_bytes,
        "stored_as": stored,
        "seconds": info.seconds,
        "chunks": len(reader.records),
        "packs": len(reader.files),
        "tensors": [_tensor_to_json(entry) for entry in reader.directory.tensors],
        "names": [dotted(entry.name) for entry in reader.directory.tensors],
    }


def _stored_to_json(stored: StoredAs) -> dict[str, Any]:
    return {
        "full": stored.is_full,
        "earlier_bytes": stored.earlier_bytes,
        "read_bytes": stored.read_bytes,
        "full_bytes": stored.full_bytes,
        "read_amplification": round(stored.amplification, 4),
        "longest_chain": stored.longest_chain,
        "transforms": [{"transform": name, **numbers} for name, numbers in sorted(stored.transforms.items())],
    }


def _read_words(stored: StoredAs) -> str:
    """What a restore reads, in words."""
    if stored.is_full:
        return f"{human(stored.read_bytes)}: full, it needs no earlier save"
    chain = f", up to {stored.longest_chain} differences one after another" if stored.longest_chain else ""
    return (
        f"{human(stored.read_bytes)}, {human(stored.earlier_bytes)} of it from packs of earlier saves: {stored.amplification:.2f} times a "
        f"full checkpoint{chain}"
    )


def _print_transforms(stored: StoredAs) -> None:
    rows: list[list[object]] = [["stored as", "chunks", "state", "stored", "ratio"]]
    for name, numbers in sorted(stored.transforms.items()):
        ratio = f"{numbers['stored_bytes'] / numbers['raw_bytes']:.3f}"
        rows.append([name, numbers["chunks"], human(numbers["raw_bytes"]), human(numbers["stored_bytes"]), ratio])
    if len(rows) > 1:
        table(rows, right=(1, 2, 3, 4))
        say()


def _print_commit(repository: Repository, row: Mapping[str, Any], commit: Commit, layout: str, read: str) -> None:
    mark = "newest" if row["newest"] else row["branch"]
    parent = "none" if commit.parent is None else "epoch {}, step {}".format(*commit.parent.checkpoint)
    lines = [
        ("repository", repository.url),
        ("checkpoint", f"epoch {commit.save.epoch}, step {commit.save.step}, try {commit.save.attempt} ({mark})"),
        ("parent", parent),
        ("saved", f"{commit.utc}, trigger {commit.trigger}, {commit.seconds:.1f} s"),
        ("size", f"{human(commit.stored_bytes)} stored for {human(commit.raw_bytes)} of state, {commit.world} ranks"),
        ("restore", f"reads {read}"),
        ("layout", layout),
        ("metrics", " ".join(f"{name}={value}" for name, value in row["metrics"].items())),
        ("meta", commit.meta or ""),
        ("writer", " ".join(f"{key} {value}" for key, value in commit.writer.items() if key != "name")),
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        if text != "":
            say(f"{label.ljust(width)}  {text}")
    say()


def _print_ranks(ranks: list[dict[str, Any]]) -> None:
    good = [rank for rank in ranks if rank["error"] is None]
    if not good:
        return
    shares = any(one["raw_bytes"] != one["held_bytes"] for one in good)
    names = ["held", "written"] if shares else ["state"]
    members = [*(["held_bytes"] if shares else []), "raw_bytes", "stored_bytes", "shared_bytes"]
    rows: list[list[object]] = [["rank", *names, "stored", "of earlier saves", "packs", "tensors", "seconds"]]
    for one in good:
        sizes = [human(one[member]) for member in members]
        rows.append([one["rank"], *sizes, one["packs"], len(one["tensors"]), f"{one['seconds']:.1f}"])
    table(rows, right=range(len(rows[0])))
    say()
    tensors: list[list[object]] = [["rank", "tensor", "type", "shape", "kind"]]
    for one in good:
        for name, entry in zip(one["names"], one["tensors"], strict=True):
            tensors.append([one["rank"], name, entry["dtype"], str(list(entry["shape"])), entry["kind"]])
    if len(tensors) > 1:
        table(tensors, right=(0,))


# Files.


def _show_container(arguments: argparse.Namespace) -> int:
    """An index: its tensors, and how the chunks are stored."""
    with open_container(arguments.path, arguments.endpoint_url) as source:
        reader = Reader.open(source, alone=True)
    groups = _transforms(reader)
    if arguments.json:
        tensors = [_tensor_to_json(t) for t in reader.directory.tensors]
        value = {"path": arguments.path, "writer": reader.directory.writer, "step": reader.directory.step}
        print_json("show", {**value, **summary(reader), "transforms": groups, "tensors": tensors})
        return OK
    if reader.directory.tensors:
        rows = [["tensor", "type", "shape", "kind"]]
        rows += [[dotted(t.name), t.dtype, str(list(t.shape)), t.kind] for t in reader.directory.tensors]
        table(rows)
        say()
    rows = [["stored as", "chunks", "state", "in the file", "ratio"]]
    for group in groups:
        ratio = f"{group['stored_bytes'] / group['raw_bytes']:.3f}"
        sizes = [str(group["chunks"]), human(group["raw_bytes"]), human(group["stored_bytes"]), ratio]
        rows.append([str(group["transform"]), *sizes])
    if groups:
        table(rows, right=(1, 2, 3, 4))
    total = summary(reader)
    writer = " ".join(f"{key} {value}" for key, value in reader.directory.writer.items() if key != "name")
    say(f"{arguments.path}: {human(total['container_bytes'])} for {human(storage_bytes(reader))} of state ({writer})")
    return OK


def _transforms(reader: Reader) -> list[dict[str, Any]]:
    """Sums of chunks and bytes for each transform."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: {"chunks": 0, "raw_bytes": 0, "stored_bytes": 0})
    seen: set[tuple[int, int]] = set()
    for record in reader.records:
        place, stored = (int(record["file"]), int(record["offset"])), int(record["stored_bytes"])
        shared = stored > 0 and place in seen
        seen.add(place)
        group = groups["equal to another" if shared else transform_of(record)]
        group["chunks"] += 1
        group["raw_bytes"] += int(record["raw_bytes"])
        group["stored_bytes"] += 0 if shared else stored
    return [{"transform": name, **group} for name, group in sorted(groups.items())]


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    value = {**entry._asdict(), "name": to_json(entry.name)}
    place = value.pop("place")
    value["global"] = None if place is None else dataclasses.asdict(place)
    return value
