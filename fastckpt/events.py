"""Typed records of what happened, for logs, progress bars and traces.

    with fastckpt.events.subscribe(print):
        fastckpt.save(state, "x.fckpt")

    with fastckpt.events.record("run.jsonl"):        # or FASTCKPT_TRACE=run.jsonl in the environment
        fastckpt.save(state, "x.fckpt")              # then: fastckpt trace run.jsonl

A subscriber is called on the thread where the event happens (several threads may call it at once) and must be quick. An exception in it is
logged and never reaches the save: an observer must not harm a checkpoint. New record types and new fields may be added; existing ones keep
their meaning.

An event with `seconds` describes a span that ended when the event was emitted. Unless its class says otherwise, the span was spent on the
thread that emits it. `target` is a container's path or URL, a repository's URL or, for the upload of one rank, URL and step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fastckpt.trace.subscribers import Event, Subscriber, emit, enabled, record, subscribe

logger = logging.getLogger("fastckpt")


@dataclass(frozen=True, kw_only=True)
class SnapshotStarted(Event):
    """The state has been walked and pickled; its bytes are about to be copied into private memory."""

    target: str
    step: int | None
    """None for saves without a step (`save_async`)."""
    raw_bytes: int
    storages: int


@dataclass(frozen=True, kw_only=True)
class PieceStaged(Event):
    """A stretch of a storage was copied. From the CPU: by the thread that emits this; from another device: by its copy engine."""

    target: str
    step: int | None
    storage: int
    offset: int
    raw_bytes: int
    seconds: float
    device: str
    """The device that held the bytes: "cpu", "cuda:0"."""


@dataclass(frozen=True, kw_only=True)
class SnapshotStaged(Event):
    """All bytes are in private memory: the state may change."""

    target: str
    step: int | None
    raw_bytes: int
    seconds: float
    """Since SnapshotStarted; several threads may have copied."""
    spared_bytes: int = 0
    """Of `raw_bytes`, those that never left their device, because the parent checkpoint has them (docs/architecture.md)."""


@dataclass(frozen=True, kw_only=True)
class SnapshotDropped(Event):
    """The snapshot could not be completed, and nothing of it is committed."""

    target: str
    step: int | None
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class FenceWaited(Event):
    """Saving kept the training thread, which emits this, from going on."""

    target: str
    step: int | None
    seconds: float
    """Host time. It is usually near 0; such an event need not be emitted."""
    why: str
    """The waiting call: "optimizer step", "fence()", "save" or "restore"."""


@dataclass(frozen=True, kw_only=True)
class SaveStarted(Event):
    """The state has been walked and pickled; its chunks are about to be encoded."""

    target: str
    raw_bytes: int
    chunks: int
    storages: int
    skeleton_s: float


@dataclass(frozen=True, kw_only=True)
class ChunkEncoded(Event):
    """One chunk was digested and encoded, by the thread that emits this. Chunks come in any order."""

    target: str
    record: int
    transform: str
    raw_bytes: int
    stored_bytes: int
    """Size before equal chunks are recognised: see ChunkStored."""
    seconds: float
    """Does not include `raw_s`."""
    effort: str = ""
    """How much time the encoder was allowed to spend: "none", "fast", "normal", "high" (docs/options.md)."""
    raw_s: float = 0.0
    """Time before that on the same thread, until the raw bytes were available: copying them, or waiting for a snapshot's copy."""


@dataclass(frozen=True, kw_only=True)
class EffortUsed(Event):
    """What one save of a Checkpointer has encoded with one effort; at its end, one event for each effort."""

    target: str
    step: int
    effort: str
    chunks: int
    raw_bytes: int
    stored_bytes: int
    """Before equal chunks are recognised."""
    encode_s: float
    """Of all encoding threads together."""
    why: str
    """The reason for the effort of the last chunk of the save."""


@dataclass(frozen=True, kw_only=True)
class DeltasUsed(Event):
    """What a save has named again, or stored as differences, instead of writing it in full. Of saves that have a base, or should have."""

    target: str
    step: int
    base_step: int | None
    """The checkpoint that it builds on; None: none."""
    chunks: dict[str, int]
    """How many chunks became what: "equal" to the base's, "difference", "cast", "full"."""
    raw_bytes: dict[str, int]
    """The same in bytes."""
    why_full: str = ""
    """Why there was no base."""


@dataclass(frozen=True, kw_only=True)
class ChunkStored(Event):
    """One chunk was encoded and handed on, by the thread that emits this. In a container, in the order of the records."""

    target: str
    record: int
    transform: str
    raw_bytes: int
    stored_bytes: int
    """0 for a chunk that needs no bytes of its own (CONST, or equal to an earlier one)."""
    encode_s: float
    """Time before that, in a container on another thread; the sum of `seconds` and `raw_s` of its ChunkEncoded."""
    write_s: float
    """Time of handing over the bytes; in a repository, the wait for a free pack before a pack's first chunk."""


@dataclass(frozen=True, kw_only=True)
class SaveFinished(Event):
    """The container is complete; if the target is a path, it is durable."""

    target: str
    raw_bytes: int
    file_bytes: int
    seconds: float
    durable_s: float
    """Part of `seconds` spent in fsync and rename."""


@dataclass(frozen=True, kw_only=True)
class SaveFailed(Event):
    """The target is as it was, unless the error came from the fsync of the directory after the rename: then the new file is there."""

    target: str
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class PackStored(Event):
    """One pack is durable. Emitted by the thread that put it."""

    target: str
    key: str
    stored_bytes: int
    seconds: float
    """Time of the put, including its checksum and all tries."""
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Committed(Event):
    """This process created a commit record: the checkpoint exists."""

    target: str
    key: str
    epoch: int
    step: int
    world: int


@dataclass(frozen=True, kw_only=True)
class CheckpointDurable(Event):
    """A save was acknowledged."""

    target: str
    step: int
    trigger: str
    raw_bytes: int
    stored_bytes: int
    seconds: float
    """Since the call of save."""


@dataclass(frozen=True, kw_only=True)
class SaveDeferred(Event):
    """A step was due, but earlier saves hold the memory: it is tried again at the next step."""

    target: str
    step: int
    waiting: int
    """Number of saves under way."""


@dataclass(frozen=True, kw_only=True)
class BaseIncomplete(Event):
    """A save begins, and host memory does not hold all bytes of the checkpoint before it: what has changed there is stored whole."""

    target: str
    step: int
    lacking_bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class FinalSave(Event):
    """A notice has come and the last save of this run begins."""

    target: str
    step: int
    source: str
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Retired(Event):
    """A checkpoint no longer exists; its bytes are deleted later."""

    target: str
    epoch: int
    step: int
    why: str


@dataclass(frozen=True, kw_only=True)
class RetentionEnded(Event):
    """A pass of retention has ended: bytes of the packs that are left of those it has listed."""

    target: str
    stored_bytes: int
    base_bytes: int
    """Of those, in packs of saves that are no checkpoint any more, which checkpoints refer to."""
    grace_bytes: int
    """Of those, in packs that no checkpoint needs, which wait for the end of their grace."""


@dataclass(frozen=True, kw_only=True)
class LoadStarted(Event):
    """The index is read and checked; `chunks` of the object's chunks are about to be read."""

    source: str
    raw_bytes: int
    chunks: int


@dataclass(frozen=True, kw_only=True)
class ChunkLoaded(Event):
    """One chunk was read, verified, decoded and put in place."""

    source: str
    record: int
    transform: str
    raw_bytes: int
    stored_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoadFinished(Event):
    """The object is complete and verified. `seconds`: since LoadStarted."""

    source: str
    raw_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StoreRetry(Event):
    """An operation of a store has failed, and is tried again after a pause of `pause_s` seconds."""

    target: str
    verb: str
    """The method of the store: "put", "get_into", …"""
    key: str
    attempt: int
    """Number of failed tries, including this one."""
    pause_s: float
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class NoticeReceived(Event):
    """A source of notices says that this machine will go, or may go."""

    kind: str
    """As in `fastckpt.Notice`."""
    source: str
    seconds_left: float | None
    """None: not known."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class NoticeSourceBlind(Event):
    """A source of notices cannot be asked: a notice from it would not be seen."""

    source: str
    error: BaseException


__all__ = ["Event", "Subscriber", "emit", "enabled", "logger", "record", "subscribe"]
