"""Typed records of what happened, for logs, progress bars and traces.

    with fastckpt.events.subscribe(print):
        fastckpt.save(state, "x.fckpt")

    with fastckpt.events.record("run.jsonl"):        # or FASTCKPT_TRACE=run.jsonl in the environment
        fastckpt.save(state, "x.fckpt")              # then: fastckpt trace run.jsonl

A subscriber is called on the thread where the event happens (several threads may call it at once) and must be quick. What it
raises is logged and never reaches the save: nothing that merely watches may harm a checkpoint. New record types and new fields may be
added; existing ones keep their meaning.

An event that has `seconds` tells of a span that ended when the event was emitted; where its class does not say otherwise, the span was
spent on the thread that emits it. `target` is a container's path or URL, a repository's URL, or, of one rank's upload, URL and step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastckpt.trace.recorder import Recorder

logger = logging.getLogger("fastckpt")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all records."""


@dataclass(frozen=True, kw_only=True)
class SnapshotStarted(Event):
    """The state has been walked and pickled; its bytes are about to be copied into private memory."""

    target: str
    step: int | None
    """None where a save has no step (`save_async`)."""
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
    """Where the bytes came from: "cpu", "cuda:0"."""


@dataclass(frozen=True, kw_only=True)
class SnapshotStaged(Event):
    """All bytes are in private memory: the state may change."""

    target: str
    step: int | None
    raw_bytes: int
    seconds: float
    """From SnapshotStarted on, whichever threads copied."""


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
    """Host time. 0 or nearly so is the usual case, and need not be emitted."""
    why: str
    """What waited: "optimizer step", "fence()", "save" or "restore"."""


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
    """Before chunks that are equal are found: see ChunkStored."""
    seconds: float
    """Without `raw_s`."""
    raw_s: float = 0.0
    """Before that, on the same thread: until the raw bytes were there. A copy of them, or the wait for a snapshot's."""


@dataclass(frozen=True, kw_only=True)
class ChunkStored(Event):
    """One chunk was encoded and handed to the sink, by the thread that emits this. In the order of the records."""

    target: str
    record: int
    transform: str
    raw_bytes: int
    stored_bytes: int
    """0 for a chunk that needs no bytes of its own (CONST, or equal to an earlier one)."""
    encode_s: float
    """On another thread, and earlier; `seconds` and `raw_s` of its ChunkEncoded."""
    write_s: float
    """Handing over; of a repository's packs with the wait for a free one."""


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
    """Of the put, with its checksum and all tries."""
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
    """From the call of save on."""


@dataclass(frozen=True, kw_only=True)
class SaveDeferred(Event):
    """A step was due, but earlier saves hold the memory: it is tried again at the next step."""

    target: str
    step: int
    waiting: int
    """Saves under way."""


@dataclass(frozen=True, kw_only=True)
class FinalSave(Event):
    """A notice has come and the last save of this run begins."""

    target: str
    step: int
    source: str
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Retired(Event):
    """A checkpoint no longer exists; its bytes go later."""

    target: str
    epoch: int
    step: int
    why: str


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
    """The object is there, verified. `seconds`: since LoadStarted."""

    source: str
    raw_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StoreRetry(Event):
    """An operation of a store failed for now and is tried again after a pause of `pause_s` seconds."""

    target: str
    verb: str
    """The method of the store: "put", "get_into", …"""
    key: str
    attempt: int
    """How many tries have failed, this one included."""
    pause_s: float
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class NoticeReceived(Event):
    """A source of notices says that this machine is going to go, or may."""

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


Subscriber = Callable[[Event], None]
_lock = threading.Lock()
_recorder_of_environment: Recorder | None = None


def _read_environment(event: Event) -> None:
    """The first subscriber of every process: at the first event it gives its place to a recorder, if FASTCKPT_TRACE asks for one."""
    global _subscribers, _recorder_of_environment  # noqa: PLW0603 - as in `subscribe`
    with _lock:
        if _read_environment in _subscribers:  # else another thread was faster
            recorder = _recorder_of_environment = _open_recorder(os.environ.get("FASTCKPT_TRACE"))
            others = tuple(one for one in _subscribers if one is not _read_environment)
            _subscribers = others if recorder is None else (recorder, *others)
        recorder = _recorder_of_environment
    if recorder is not None:
        recorder(event)


def _open_recorder(path: str | None) -> Recorder | None:
    if not path:
        return None
    try:
        return Recorder(os.path.expanduser(path))
    except Exception as error:  # a wish to watch is no reason to fail
        logger.warning("FASTCKPT_TRACE: events are not recorded: %s: %s", type(error).__name__, error)
        return None


_subscribers: tuple[Subscriber, ...] = (_read_environment,)


def _in_forked_child() -> None:
    """Recordings are the parent's; a child that saves opens one of its own, if the environment asks for it."""
    global _lock, _subscribers, _recorder_of_environment  # noqa: PLW0603 - there is one thread
    _lock = threading.Lock()  # somebody may have held it
    for subscriber in _subscribers:
        if isinstance(subscriber, Recorder):
            subscriber.forget()
    left = tuple(one for one in _subscribers if one not in (_recorder_of_environment, _read_environment))
    _subscribers, _recorder_of_environment = (_read_environment, *left), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


@contextlib.contextmanager
def subscribe(subscriber: Subscriber) -> Iterator[None]:
    """Call `subscriber` with every event of this process while the context is open."""
    global _subscribers  # noqa: PLW0603 - replaced whole under the lock, read without it
    with _lock:
        _subscribers = (*_subscribers, subscriber)
    try:
        yield
    finally:
        with _lock:
            left = list(_subscribers)
            left.remove(subscriber)
            _subscribers = tuple(left)


@contextlib.contextmanager
def record(path: str | os.PathLike[str]) -> Iterator[Recorder]:
    """Write every event of this process to a new file while the context is open: what `fastckpt trace` reads. Gives the recorder.

    path: `{pid}` and `{rank}` ($RANK, or 0) are replaced; where there is a file already, a number is added (`run.jsonl`, `run-1.jsonl`);
    `recorder.path` has the name. OSError if none can be made. Later troubles (a full disk, 128 MiB written) end the recording with one
    warning and nothing else. Saves still under way at the end of the context are recorded only so far.
    """
    recorder = Recorder(path)
    try:
        with subscribe(recorder):
            yield recorder
    finally:
        recorder.close()


def enabled() -> bool:
    """Whether anybody listens: what costs more than a microsecond to find out may be left out where nobody does."""
    return bool(_subscribers) or logger.isEnabledFor(logging.DEBUG)


def emit(event: Event) -> None:
    """Hand an event to all subscribers and to the log (debug level). Never raises."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", event)
    for subscriber in _subscribers:
        try:
            subscriber(event)
        except Exception:
            logger.exception("a subscriber of fastckpt.events failed; the operation goes on")
