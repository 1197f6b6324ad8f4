"""The sealed objects of a repository as values: marker, epoch, commit, tombstone, pin (docs/format.md, section 11.1)."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastckpt._version import __version__
from fastckpt.format.container import INDEX_PARTS
from fastckpt.format.fields import MAX_INTEGER, Findings, JsonFields
from fastckpt.format.keys import MAX_EPOCH, MAX_TRY, MAX_WORLD, CheckpointId, SaveId, VoteName
from fastckpt.format.pack_ranges import PackRanges, ranges_of_json, ranges_to_json
from fastckpt.format.sealed import seal, seal_of, unseal


@dataclass(frozen=True)
class Origin:
    """The repository that a copy was first made of."""

    repository: str
    url: str
    """Where it was then; for people."""


@dataclass(frozen=True)
class Marker:
    """The object that makes a directory or prefix a repository."""

    repository: str
    utc: str
    writer: dict[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    """Of a copy: the repository that it was made of."""


@dataclass(frozen=True)
class Parent:
    """The commit that a save or an epoch continues from."""

    checkpoint: CheckpointId
    digest: str


@dataclass(frozen=True)
class Skipped:
    """A commit that `latest-valid` passed over."""

    checkpoint: CheckpointId
    why: str


@dataclass(frozen=True)
class Epoch:
    """One incarnation's claim."""

    number: int
    parent: Parent | None
    fresh: bool
    """A fresh start although there were checkpoints: the history ends here."""
    rewind: bool
    """A person asked for the parent, or newer checkpoints were passed over: the epoch counts even before it has a commit."""
    skipped: tuple[Skipped, ...]
    world: int
    nonce: str
    utc: str
    writer: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VoteEntry:
    """One rank's vote in a commit record. parts: name → (offset, bytes)."""

    n_bytes: int
    digest: str
    parts: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Commit:
    """A commit record: the checkpoint exists because this does. Its 13 attributes are the record's members (docs/format.md)."""

    save: SaveId
    world: int
    parent: Parent | None
    trigger: str
    metrics: dict[str, float]
    meta: dict[str, Any]
    raw_bytes: int
    stored_bytes: int
    seconds: float
    utc: str
    votes: tuple[VoteEntry, ...]
    writer: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    """The record's own digest; "" before the record was read from its bytes."""

    @property
    def checkpoint(self) -> CheckpointId:
        return self.save.checkpoint

    def vote(self, rank: int) -> VoteName:
        """The name of a rank's vote."""
        entry = self.votes[rank]
        return VoteName(self.save, rank, self.world, entry.n_bytes, entry.digest)


@dataclass(frozen=True)
class Tombstone:
    """The record in the place of a retired commit, or of a save that must never be committed."""

    checkpoint: CheckpointId
    of: str | None
    why: str
    utc: str
    named: PackRanges | None = None
    """Packs of other saves that the checkpoint named. None: not known, if it replaced a commit record; otherwise it named nothing."""


@dataclass(frozen=True)
class Pin:
    """Keeps a checkpoint while somebody reads it."""

    checkpoint: CheckpointId
    expires_s: int
    owner: str
    utc: str


def utc_now() -> str:
    """The current time in UTC, for people; nothing is decided by it."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def writer() -> dict[str, str]:
    """A description of the writer, for people; without torch's version, which this layer does not know."""
    return {"name": "fastckpt", "version": __version__, "python": platform.python_version(), "host": platform.node()}


def parse_parent(value: JsonFields) -> Parent | None:
    inner = value.optional("parent")
    return None if inner is None else Parent(inner.checkpoint(), inner.hex32("digest"))


# Metrics: JSON has no NaN, but a loss may be NaN.


def metrics_to_json(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Numbers as they are, NaN and infinities as strings."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        number = float(value)
        if math.isfinite(number):
            found[name] = number
        else:
            found[name] = "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return found


def parent_to_json(parent: Parent | None) -> dict[str, Any] | None:
    if parent is None:
        return None
    return {"epoch": parent.checkpoint.epoch, "step": parent.checkpoint.step, "digest": parent.digest}


def marker_bytes(marker: Marker) -> bytes:
    members: dict[str, Any] = {"repository": marker.repository, "utc": marker.utc, "writer": marker.writer}
    if marker.origin is not None:
        members["origin"] = {"repository": marker.origin.repository, "url": marker.origin.url}
    return seal("marker", members)


def epoch_bytes(epoch: Epoch) -> bytes:
    skipped = [{"epoch": s.checkpoint.epoch, "step": s.checkpoint.step, "why": s.why} for s in epoch.skipped]
    return seal(
        "epoch",
        {
            "epoch": epoch.number,
            "parent": parent_to_json(epoch.parent),
            "fresh": epoch.fresh,
            "rewind": epoch.rewind,
            "skipped": skipped,
            "world": epoch.world,
            "nonce": epoch.nonce,
            "utc": epoch.utc,
            "writer": epoch.writer,
        },
    )


def commit_bytes(commit: Commit) -> bytes:
    return seal(
        "commit",
        {
            "epoch": commit.save.epoch,
            "step": commit.save.step,
            "try": commit.save.attempt,
            "world": commit.world,
            "parent": parent_to_json(commit.parent),
            "trigger": commit.trigger,
            "metrics": metrics_to_json(commit.metrics),
            "meta": commit.meta,
            "raw_bytes": commit.raw_bytes,
            "stored_bytes": commit.stored_bytes,
            "seconds": commit.seconds,
            "utc": commit.utc,
            "writer": commit.writer,
            "votes": [{"bytes": v.n_bytes, "digest": v.digest, "parts": v.parts} for v in commit.votes],
        },
    )


def tombstone_bytes(tombstone: Tombstone) -> bytes:
    members: dict[str, Any] = {"epoch": tombstone.checkpoint.epoch, "step": tombstone.checkpoint.step}
    if tombstone.named is not None:
        members["named"] = ranges_to_json(tombstone.named)
    return seal("tombstone", {**members, "of": tombstone.of, "why": tombstone.why, "utc": tombstone.utc})


def pin_bytes(pin: Pin) -> bytes:
    members = {"epoch": pin.checkpoint.epoch, "step": pin.checkpoint.step}
    return seal("pin", {**members, "expires_s": pin.expires_s, "owner": pin.owner, "utc": pin.utc})


def parse_marker(data: bytes, source: str) -> Marker:
    """Read a marker. CorruptCheckpointError lists all findings, UnsupportedFormatError for a newer version. The other parsers do the
    same.
    """
    value = JsonFields(unseal(data, "marker", source), Findings("marker", source))
    inner = value.optional("origin")
    origin = None if inner is None else Origin(inner.hex32("repository"), inner.text("url"))
    marker = Marker(value.hex32("repository"), value.text("utc"), value.strings("writer"), origin)
    value.findings.raise_damage()
    return marker


def parse_epoch_record(data: bytes, number: int, source: str) -> Epoch:
    """Read an epoch record. number: from its key."""
    value = JsonFields(unseal(data, "epoch", source), Findings("epoch", source))
    skipped = [Skipped(inner.checkpoint(), inner.text("why")) for inner in value.objects("skipped")]
    found = value.integer("epoch", 1, MAX_EPOCH)
    value.demand(found == number, "epoch", f"{number}, as the key says", found)
    parent = parse_parent(value)
    if parent is not None:
        value.demand(parent.checkpoint.epoch < number, "parent", "an earlier epoch", parent.checkpoint.epoch)
    epoch = Epoch(
        number,
        parent,
        value.boolean("fresh"),
        value.boolean("rewind"),
        tuple(skipped),
        value.integer("world", 1, MAX_WORLD),
        value.hex32("nonce"),
        value.text("utc"),
        value.strings("writer"),
    )
    value.findings.raise_damage()
    return epoch


def parse_commit_record(data: bytes, checkpoint: CheckpointId, source: str) -> Commit | Tombstone:
    """Read the record at a commit key. checkpoint: from the key."""
    content = unseal(data, ("commit", "tombstone"), source)
    value = JsonFields(content, Findings(content["fastckpt"], source))
    found = value.checkpoint()
    value.demand(found == checkpoint, "epoch, step", f"{checkpoint}, as the key says", str(found))
    if content["fastckpt"] == "tombstone":
        of = None if content.get("of") is None else value.hex32("of")
        tombstone = Tombstone(checkpoint, of, value.text("why"), value.text("utc"), _named(content, value))
        value.findings.raise_damage()
        return tombstone
    world = value.integer("world", 1, MAX_WORLD)
    votes = [VoteEntry(one.integer("bytes"), one.hex32("digest"), _parts(one)) for one in value.objects("votes")]
    value.demand(len(votes) == world, "votes", f"{world}, one for each rank", len(votes))
    commit = Commit(
        SaveId(checkpoint.epoch, checkpoint.step, value.integer("try", 0, MAX_TRY)),
        world,
        parse_parent(value),
        value.text("trigger"),
        value.metrics("metrics"),
        value.mapping("meta"),
        value.integer("raw_bytes"),
        value.integer("stored_bytes"),
        value.seconds("seconds"),
        value.text("utc"),
        tuple(votes),
        value.strings("writer"),
        seal_of(data),
    )
    value.findings.raise_damage()
    return commit


def _named(content: dict[str, Any], value: JsonFields) -> PackRanges | None:
    if content.get("named") is None:
        return None
    found = ranges_of_json(value.mapping("named"))
    value.demand(found is not None, "named", "a folder of packs → runs of their numbers", content["named"])
    return found


def _parts(value: JsonFields) -> dict[str, tuple[int, int]]:
    found = value.mapping("parts")
    parts = {}
    for name in INDEX_PARTS:
        part = found.get(name)
        right = (
            isinstance(part, list) and len(part) == 2 and all(type(n) is int and 0 <= n <= MAX_INTEGER for n in part)
        )
        value.demand(right, f"parts, {name}", "[offset, bytes]", part)
        if isinstance(part, list) and right:
            parts[name] = (part[0], part[1])
    return parts


def parse_pin(data: bytes, source: str) -> Pin:
    value = JsonFields(unseal(data, "pin", source), Findings("pin", source))
    pin = Pin(value.checkpoint(), value.integer("expires_s"), value.text("owner"), value.text("utc"))
    value.findings.raise_damage()
    return pin
