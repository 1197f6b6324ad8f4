"""Content of a vote about its save, and the commit record that follows from all votes (docs/format.md, section 11.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.container import INDEX_PARTS, Footer
from fastckpt.format.digest import digest
from fastckpt.format.directory import Directory, FileEntry
from fastckpt.format.fields import Findings, JsonFields
from fastckpt.format.keys import MAX_EPOCH, MAX_TRY, SaveId, VoteName
from fastckpt.format.repository_records import Commit, Parent, VoteEntry, metrics_to_json, parent_to_json, parse_parent
from fastckpt.format.shares import Claims, GroupClaim, print_conflicts


def vote_name(save: SaveId, rank: int, world: int, data: bytes) -> VoteName:
    """The name of a vote with these bytes."""
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


@dataclass(frozen=True)
class Vote:
    """The facts about a vote that a commit record needs, whether the vote was read or built here."""

    name: VoteName
    info: SaveInfo
    directory: Directory
    parts: Mapping[str, tuple[int, int]]
    """Offset and bytes of each part of the index."""
    files: tuple[FileEntry, ...]
    """The packs that the vote names."""
    groups: tuple[GroupClaim, ...] = ()
    """What its rank holds alike with others, if it was built here: one that is read has its directory to tell."""


def replica_conflicts(votes: Iterable[Vote]) -> list[str]:
    """What ranks of one save ought to have held alike and did not, in words: as far as their votes have prints of it."""
    return print_conflicts(vote.directory for vote in votes)


def unmet_shares(votes: Iterable[Vote]) -> list[str]:
    """Shares that ranks of one save count on and no vote has, in words."""
    claims = Claims()
    for vote in votes:
        claims.add(vote.name.rank, vote.directory)
    return list(map(str, claims.unmet()))


def part_ranges(footer: Footer) -> dict[str, tuple[int, int]]:
    """Offset and bytes of each part of an index."""
    return {part: (footer.parts[part].offset, footer.parts[part].n_bytes) for part in INDEX_PARTS}


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
    """Read a vote's member `save`, and check that it agrees with the vote's name. CorruptCheckpointError lists the differences."""
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


def commit_of(votes: Sequence[Vote], source: str) -> Commit:
    """The commit record of a try, from the votes of all ranks, rank 0's first. The same votes give the same record.

    CorruptCheckpointError where they are not of one save, or a share that one rank counts on is in no vote: nothing may come of that.
    """
    name, first, directory = votes[0].name, votes[0].info, votes[0].directory
    for i, vote in enumerate(votes):
        expected = (first.save, first.parent, i)
        found = (vote.info.save, vote.info.parent, vote.name.rank)
        if expected != found:
            raise CorruptCheckpointError(source, [Damage("votes", f"vote {i}", str(expected), str(found))])
    unmet = unmet_shares(votes)
    if unmet:
        raise CorruptCheckpointError(
            source, [Damage("votes", "shares", "each in the vote of its rank", w) for w in unmet]
        )
    return Commit(
        save=name.save,
        world=name.world,
        parent=first.parent,
        trigger=first.trigger,
        metrics=dict(first.metrics),
        meta=directory.meta,
        raw_bytes=sum(vote.info.raw_bytes for vote in votes),
        stored_bytes=sum(vote.info.stored_bytes for vote in votes),
        seconds=max(vote.info.seconds for vote in votes),
        utc=first.utc,
        votes=tuple(VoteEntry(vote.name.n_bytes, vote.name.digest, dict(vote.parts)) for vote in votes),
        writer=directory.writer,
    )
