"""Who is told of events, and how: subscribers in this process, and the recording that the environment asks for.

Knows nothing of particular events: those are `fastckpt.events`, which is what others import.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastckpt.trace.recorder import Recorder, open_recorder

logger = logging.getLogger("fastckpt")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all records."""


Subscriber = Callable[[Event], None]
_lock = threading.Lock()
_recorder_of_environment: Recorder | None = None


def _read_environment(event: Event) -> None:
    """The first subscriber of every process. At the first event it is replaced by a recorder, if FASTCKPT_TRACE asks for one."""
    global _subscribers, _recorder_of_environment  # noqa: PLW0603 - as in `subscribe`
    with _lock:
        if _read_environment in _subscribers:  # otherwise another thread was faster
            recorder = _recorder_of_environment = open_recorder(os.environ.get("FASTCKPT_TRACE"))
            others = tuple(one for one in _subscribers if one is not _read_environment)
            _subscribers = others if recorder is None else (recorder, *others)
        recorder = _recorder_of_environment
    if recorder is not None:
        recorder(event)


_subscribers: tuple[Subscriber, ...] = (_read_environment,)


def _in_forked_child() -> None:
    """Recordings belong to the parent; a child that saves opens its own, if the environment asks for it."""
    global _lock, _subscribers, _recorder_of_environment  # noqa: PLW0603 - there is one thread
    _lock = threading.Lock()  # another thread of the parent may have held it
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
    """Write every event of this process to a new file while the context is open, for `fastckpt trace`. Yields the recorder.

    path: `{pid}` and `{rank}` ($RANK, or 0) are replaced; if the file exists, a number is added (`run.jsonl`, `run-1.jsonl`);
    `recorder.path` has the name. OSError if no file can be made. Later problems (a full disk, 128 MiB written) end the recording with one
    warning and have no other effect. Saves still under way at the end of the context are recorded only up to that moment.
    """
    recorder = Recorder(path)
    try:
        with subscribe(recorder):
            yield recorder
    finally:
        recorder.close()


def enabled() -> bool:
    """Whether there are subscribers. Without them, information that takes more than a microsecond to compute may be left out."""
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
