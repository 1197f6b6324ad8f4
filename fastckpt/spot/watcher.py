"""A thread that asks all sources every few seconds. It never raises into training and never dies; it reports when it is blind."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from fastckpt import events
from fastckpt.events import NoticeReceived, NoticeSourceBlind, logger
from fastckpt.host.threads import start
from fastckpt.spot.notice import Notice
from fastckpt.spot.sources.base import NoticeSource
from fastckpt.spot.sources.signals import SignalSource

# A generator of our own: drawing from the global one would change the numbers that training draws.
_random = random.Random()
POLL_S = 2.0  # AWS advises 5 s; 2 s cost nothing and leave three more seconds of 120


class Watcher:
    """Made, started and closed by the training thread; any thread may read `final`, `early` and `blind`.

    A watcher that nobody holds any more stops by itself and puts the signals' handlers back.
    """

    def __init__(
        self,
        sources: Sequence[NoticeSource],
        poll_s: float = POLL_S,
        at_signal: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """at_signal: called in a signal's handler, when that signal is a notice. Takes no lock and raises nothing. clock: what deadlines of
        notices refer to.
        """
        self._sources = list(sources)
        self._signals = [source for source in self._sources if isinstance(source, SignalSource)]
        for source in self._signals:
            source.at_once = at_signal
        self._poll_s, self._clock = poll_s, clock
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._final: Notice | None = None
        self.early: Notice | None = None
        self.blind: dict[str, float] = {}
        """Source → the clock's time since when it has not answered."""
        self._said: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Install signal handlers and begin to poll."""
        for source in self._signals:
            source.install()
        if len(self._signals) < len(self._sources):
            # A daemon: nothing of value is lost with it, and it must not keep a script alive that forgot to close its Checkpointer.
            self._thread = threading.Thread(
                target=_watch, args=(weakref.ref(self), self._stop), name="fastckpt-watcher", daemon=True
            )
            start(
                self._thread
            )  # does not start if the interpreter is ending; then no training loop could react to a notice
        logger.info("watched for notices: %s", ", ".join(source.name for source in self._sources) or "nothing")

    def close(self) -> None:
        """Put signal handlers back and stop polling, without waiting for a request in flight. May be called twice."""
        self._stop.set()
        for source in self._signals:
            source.close()

    @property
    def final(self) -> Notice | None:
        """The notice that ends this run: the one with the earliest deadline. It does not change any more. None in a forked child: the
        notice belongs to the parent.
        """
        if os.getpid() != self._pid:
            return None
        for source in self._signals:  # without waiting for the next poll
            self._ask(source)
        return self._final

    @property
    def takes_signals(self) -> bool:
        """Whether any source listens to signals."""
        return bool(self._signals)

    def poll(self) -> float:
        """Ask every source except signals, which need no asking. Returns the seconds until the next poll."""
        for source in self._sources:
            if source not in self._signals:
                self._ask(source)
        return self._poll_s * _random.uniform(0.8, 1.2)

    def _ask(self, source: NoticeSource) -> None:
        try:
            notices = list(source.poll(self._clock()))
            for notice in notices:
                if isinstance(notice, Notice):
                    self._take(notice)
            wrong = [type(notice).__name__ for notice in notices if not isinstance(notice, Notice)]
            if wrong:
                raise TypeError(f"poll returned {', '.join(wrong)}: expected fastckpt.spot.Notice")
        except Exception as error:
            self._went_blind(source, error)
            return
        if self.blind.pop(source.name, None) is not None:
            logger.info("%s can be watched again", source.name)

    def _went_blind(self, source: NoticeSource, error: Exception) -> None:
        self.blind.setdefault(source.name, self._clock())
        key = (source.name, f"{type(error).__name__}: {error}")
        if (
            key not in self._said and len(self._said) < 100
        ):  # once for each text: a message every two seconds would bury everything else
            self._said.add(key)
            quiet = getattr(source, "optional", False)
            logger.log(20 if quiet else 30, "no notice can come from %s: %s", source.name, error)
            events.emit(NoticeSourceBlind(source=source.name, error=error))

    def _take(self, notice: Notice) -> None:
        left_s = notice.seconds_left(self._clock())
        logger.warning(
            "%s: %s, %s seconds left",
            notice.source,
            notice.detail or notice.kind,
            "?" if left_s is None else f"{left_s:.0f}",
        )
        with self._lock:
            if not notice.final:
                self.early = self.early or notice
            elif self._final is None or _sooner(notice, self._final):
                self._final = notice
        events.emit(NoticeReceived(kind=notice.kind, source=notice.source, seconds_left=left_s, detail=notice.detail))


def _sooner(a: Notice, b: Notice) -> bool:
    return a.deadline_s is not None and (b.deadline_s is None or a.deadline_s < b.deadline_s)


def _watch(watcher: weakref.ref[Watcher], stop: threading.Event) -> None:
    while not stop.is_set():
        watching = watcher()
        if watching is None:
            return
        wait_s = watching.poll()
        del watching  # the waiting thread must not keep the watcher alive
        stop.wait(wait_s)
