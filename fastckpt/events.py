"""Typed records of what happened, for logs, progress bars and traces.

    with fastckpt.events.subscribe(print):
        fastckpt.save(state, "x.fckpt")

A subscriber is called on the thread where the event happens (several threads may call it at once) and must be quick. What it
raises is logged and never reaches the save: nothing that merely watches may harm a checkpoint. New record types and new fields may be
added; existing ones keep their meaning.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

logger = logging.getLogger("fastckpt")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all records."""


@dataclass(frozen=True, kw_only=True)
class SaveStarted(Event):
    """The state has been walked and pickled; its chunks are about to be encoded."""

    target: str
    raw_bytes: int
    chunks: int
    storages: int
    skeleton_s: float


@dataclass(frozen=True, kw_only=True)
class ChunkStored(Event):
    """One chunk was encoded and handed to the sink."""

    target: str
    record: int
    transform: str
    raw_bytes: int
    stored_bytes: int
    """0 for a chunk that needs no bytes of its own (CONST, or equal to an earlier one)."""
    encode_s: float
    write_s: float


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
    """One pack is durable."""

    target: str
    key: str
    stored_bytes: int
    seconds: float


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


@dataclass(frozen=True, kw_only=True)
class LoadFinished(Event):
    source: str
    raw_bytes: int
    seconds: float


Subscriber = Callable[[Event], None]
_subscribers: tuple[Subscriber, ...] = ()
_lock = threading.Lock()


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


def emit(event: Event) -> None:
    """Hand an event to all subscribers and to the log (debug level)."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", event)
    for subscriber in _subscribers:
        try:
            subscriber(event)
        except Exception:
            logger.exception("a subscriber of fastckpt.events failed; the operation goes on")
