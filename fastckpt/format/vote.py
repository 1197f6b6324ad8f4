"""What a vote says about the save it belongs to, and the commit record that follows from all votes (docs/format.md, section 11.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.digest import digest
from fastckpt.format.directory import Directory
from fastckpt.format.fields import Findings, JsonFields
from fastckpt.format.keys import MAX_EPOCH, MAX_TRY, SaveId, VoteName
from fastckpt.format.repository_records import Commit, Parent, VoteEntry, metrics_to_json, parent_to_json, parse_parent


def vote_name(save: SaveId, rank: int, world: int, data: bytes) -> VoteName:
    """The name that a vote of these bytes has."""
    return VoteName(save, rank, world, len(data), digest(data).hex())


@dataclass(frozen=True)
class SaveInfo:
    """The member `save` of a vote's directory."""

    save: SaveId
    parent: Parent | None
    trigger: str
    metrics: Mapping[str, float]
    raw_bytes: int
    stored_bytes: int
    seconds: float
    utc: str


def save_to_json(info: SaveInfo) -> dict[str, Any]:
    return {
        "epoch": info.save.epoch,
        "try": info.save.attempt,
        "parent": parent_to_json(info.parent),
        "trigger": info.trigger,
        "metrics": metrics_to_json(info.metrics),
        "raw_bytes": info.raw_bytes,
        "stored_bytes": info.stored_bytes,
        "seconds": round(info.seconds, 3),
        "utc": info.utc,
    }


def save_info(directory: Directory, name: VoteName, source: str) -> SaveInfo:
    """Read it, and check that the vote is the one its name says. CorruptCheckpointError lists what differs."""
    value = JsonFields(directory.save, Findings("directory", source))
    epoch, attempt = value.integer("epoch", 1, MAX_EPOCH), value.integer("try", 0, MAX_TRY)
    said = (epoch, directory.step, attempt, directory.rank, directory.world)
    named = (*name.save, name.rank, name.world)
    value.demand(said == named, "epoch, step, try, rank, world", f"{named}, as the key says", said)
    info = SaveInfo(
        name.save,
        parse_parent(value),
        value.text("trigger"),
        value.metrics("metrics"),
        value.integer("raw_bytes"),
        value.integer("stored_bytes"),
        value.seconds("seconds"),
        value.text("utc"),
    )
    value.findings.raise_damage()
    return info


def commit_of(
    votes: Sequence[tuple[VoteName, SaveInfo, Directory, Mapping[str, tuple[int, int]]]], source: str
) -> Commit:
    """The commit record of a try, from the votes of all ranks, rank 0's first.

    Each: name, info, directory, and part → (offset, bytes). Whoever calls this with the same votes gets the same record.
    """
    name, first, directory, _ = votes[0]
    for i, (other, info, *_rest) in enumerate(votes):
        expected = (first.save, first.parent, i)
        found = (info.save, info.parent, other.rank)
        if expected != found:
            raise CorruptCheckpointError(source, [Damage("votes", f"vote {i}", str(expected), str(found))])
    return Commit(
        save=name.save,
        world=name.world,
        parent=first.parent,
        trigger=first.trigger,
        metrics=dict(first.metrics),
        meta=directory.meta,
        raw_bytes=sum(info.raw_bytes for _, info, *_rest in votes),
        stored_bytes=sum(info.stored_bytes for _, info, *_rest in votes),
        seconds=max(info.seconds for _, info, *_rest in votes),
        utc=first.utc,
        votes=tuple(VoteEntry(vote.n_bytes, vote.digest, dict(parts)) for vote, _, _, parts in votes),
        writer=directory.writer,
    )
