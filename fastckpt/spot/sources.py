"""Where notices come from. A source may raise in `poll`: the watcher takes it for blind."""

from __future__ import annotations

import datetime
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fastckpt.events import logger
from fastckpt.spot import handlers
from fastckpt.spot.imds import ImdsClient, Reply
from fastckpt.spot.notice import Notice

NOTICE_S = 120.0  # what EC2 gives for stop and terminate, at best
SLURM_WARNING_S = 60.0  # `sbatch --signal` without a time sends it so long before the end
_LONGEST_WARNING_S = 3600.0
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
    """Signals such as SIGTERM. Only the main thread can set handlers; earlier ones are called after ours, and put back by `close`.

    Sources may be closed in any order. One that nobody holds any more counts as closed.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,), grace_s: float | None = None) -> None:
        """grace_s: what the launcher gives before it kills; default FASTCKPT_SIGTERM_GRACE_S, or 30, as Kubernetes and torchrun do."""
        self._watch(signals)
        self._grace_s = _sigterm_grace_s() if grace_s is None else grace_s
        self._received: list[tuple[int, float]] = []
        self._returned = 0
        self.pid = os.getpid()
        self.at_once: Callable[[], None] | None = None
        """Called in the signal's handler, once it is noted: what cannot wait for the next poll. Takes no lock and raises nothing."""

    def _watch(self, signals: Sequence[int]) -> None:
        self._signals = tuple(signals)
        self.name = " ".join(signal.Signals(number).name for number in signals)

    def install(self) -> None:
        if not handlers.may_be_set():
            logger.warning(
                "%s is not watched: handlers can be set by the main thread only. Open the Checkpointer there", self.name
            )
            return
        self.pid = os.getpid()
        for number in self._signals:
            handlers.install(number, self)

    def received(self, number: int, now_s: float) -> None:
        # Appending is one step of the interpreter: no lock that the interrupted code could hold.
        self._received.append((number, now_s))
        if self.at_once is not None:
            self.at_once()

    def left_s(self, number: int) -> float:
        """Seconds from the signal to the end of the process."""
        return self._grace_s

    def poll(self, now_s: float) -> list[Notice]:
        new, self._returned = self._received[self._returned :], len(self._received)
        names = [(signal.Signals(number).name, at + self.left_s(number)) for number, at in new]
        return [Notice("signal", name, deadline_s, name) for name, deadline_s in names]

    def close(self) -> None:
        """Put the previous handlers back, unless others of ours still want to be told or somebody has set another one since. Outside the
        main thread the signal is only passed on from now on.
        """
        for number in self._signals:
            handlers.remove(number, self)


class SlurmSource(SignalSource):
    """SIGTERM, and SIGUSR1 as `sbatch --signal=USR1@seconds` has it sent before: unless the process uses SIGUSR1 for something else."""

    def install(self) -> None:
        if signal.SIGUSR1 in self._signals and not handlers.is_default(signal.SIGUSR1):
            logger.info("SIGUSR1 is not watched: somebody in this process handles it")
            self._watch([number for number in self._signals if number != signal.SIGUSR1])
        super().install()

    def left_s(self, number: int) -> float:
        if number != signal.SIGUSR1:
            return super().left_s(number)
        try:
            left_s = float(os.environ.get("SLURM_JOB_END_TIME", "")) - time.time()
        except ValueError:
            return SLURM_WARNING_S
        # Sent long before the end, it announces a preemption.
        return left_s if 0 < left_s <= _LONGEST_WARNING_S else SLURM_WARNING_S
