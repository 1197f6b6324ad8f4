"""Where notices come from. A source may raise in `poll`: the watcher takes it for blind."""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastckpt.events import logger
from fastckpt.spot.imds import ImdsClient, Reply
from fastckpt.spot.notice import Notice

NOTICE_S = 120.0  # what EC2 gives for stop and terminate, at best
_SANE_SKEW_S = 600.0
_META = "latest/meta-data/"


class NoticeSource(Protocol):
    """Something that knows when the machine goes."""

    name: str

    def poll(self, now_s: float) -> list[Notice]:
        """Notices that were not returned before. now_s: time.monotonic(). Called by one thread, every few seconds."""


class Ec2Source:
    """EC2: interruption notice, rebalance recommendation, the autoscaling group's own decision."""

    def __init__(self, client: ImdsClient, wall_clock: Callable[[], float] = time.time) -> None:
        self.name = "ec2"
        self.optional = False
        """Not being on EC2 is no news: say so at the level of information only."""
        self._client = client
        self._wall_clock = wall_clock
        self._seen: set[tuple[str, str]] = set()

    def poll(self, now_s: float) -> list[Notice]:
        found = []
        action = self._client.get(_META + "spot/instance-action")
        if action is not None:
            found.append(self._action(action, now_s))
        else:
            old = self._client.get(_META + "spot/termination-time")
            left_s = None if old is None else self._left_s(old.text, old)
            # Stale past times stay there when EC2 failed to reclaim the machine.
            if old is not None and left_s is not None and left_s > 0:
                found.append(
                    ("terminate", old.text, Notice("terminate", self.name, now_s + min(left_s, NOTICE_S), old.text))
                )
        rebalance = self._client.get(_META + "events/recommendations/rebalance")
        if rebalance is not None:
            found.append(("rebalance", rebalance.text, Notice("rebalance", self.name, None, rebalance.text[:200])))
        state = self._client.get(_META + "autoscaling/target-lifecycle-state")
        if state is not None and state.text == "Terminated":
            found.append(
                (
                    "lifecycle",
                    "",
                    Notice("lifecycle", self.name, now_s + NOTICE_S, "the autoscaling group ends this machine"),
                )
            )
        fresh = [notice for kind, when, notice in found if (kind, when) not in self._seen]
        self._seen.update((kind, when) for kind, when, _ in found)
        return fresh

    def _action(self, reply: Reply, now_s: float) -> tuple[str, str, Notice]:
        try:
            value = json.loads(reply.text)
            action, when = str(value["action"]), str(value["time"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # Something is there where nothing is unless the machine goes. Cut short or not, it means that.
            action, when = "terminate", ""
        kind = action if action in ("terminate", "stop", "hibernate") else "terminate"
        left_s = self._left_s(when, reply)
        left_s = NOTICE_S if left_s is None else min(max(left_s, 0.0), NOTICE_S)
        if kind == "hibernate":  # begins at once
            left_s = 0.0
        return kind, when, Notice(kind, self.name, now_s + left_s, f"{action[:40]} at {when[:40]}")

    def _left_s(self, when: str, reply: Reply) -> float | None:
        """Seconds until a UTC time; None if it is none."""
        try:
            then = (
                datetime.datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc).timestamp()
            )
        except ValueError:
            return None
        here_s = self._wall_clock()
        # The service's own clock, unless it is so far off that it must be wrong itself: this machine's may have drifted by minutes.
        if reply.date_s is not None and abs(reply.date_s - here_s) <= _SANE_SKEW_S:
            here_s = reply.date_s
        return then - here_s


class FileSource:
    """A file whose appearance is the notice; its first line may be the seconds left. That it goes away again changes nothing."""

    def __init__(self, path: str | os.PathLike[str], default_left_s: float | None = None) -> None:
        self._path = os.fspath(path)
        self.name = f"file {self._path}"
        self._default_left_s = default_left_s
        self._seen = False

    def poll(self, now_s: float) -> list[Notice]:
        if self._seen:
            return []
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                text = file.read(4096).strip()
        except FileNotFoundError:
            return []
        self._seen = True
        left_s = self._default_left_s
        try:
            value = float(text.splitlines()[0])
            left_s = value if 0 <= value < 1e6 else left_s
        except (ValueError, IndexError):
            pass  # the file's being there is the notice
        return [Notice("file", self.name, None if left_s is None else now_s + left_s, text[:200])]


def _sigterm_grace_s() -> float:
    text = os.environ.get("FASTCKPT_SIGTERM_GRACE_S", "30")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ValueError(f"FASTCKPT_SIGTERM_GRACE_S is {text!r}: expected seconds, a number ≥ 0")
    return value


class SignalSource:
    """Signals such as SIGTERM. Only the main thread can set handlers; earlier ones are called after ours, and put back by `close`."""

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,), grace_s: float | None = None) -> None:
        """grace_s: what the launcher gives before it kills; default FASTCKPT_SIGTERM_GRACE_S, or 30, as Kubernetes and torchrun do."""
        self.name = " ".join(signal.Signals(number).name for number in signals)
        self._signals = tuple(signals)
        self._grace_s = _sigterm_grace_s() if grace_s is None else grace_s
        self._received: list[tuple[int, float]] = []
        self._returned = 0
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "%s is not watched: handlers can be set by the main thread only. Open the Checkpointer there", self.name
            )
            return
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        # Appending is one step of the interpreter: no lock that the interrupted code could hold.
        self._received.append((number, time.monotonic()))
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)

    def poll(self, now_s: float) -> list[Notice]:
        new, self._returned = self._received[self._returned :], len(self._received)
        return [Notice("signal", signal.Signals(n).name, at + self._grace_s, signal.Signals(n).name) for n, at in new]

    def close(self) -> None:
        """Put the previous handlers back, where ours are still the ones that are set. Main thread; elsewhere nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}
