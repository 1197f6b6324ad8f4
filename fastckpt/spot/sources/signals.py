"""Notices that a launcher gives by a signal: SIGTERM, and SLURM's SIGUSR1."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

from fastckpt.events import logger
from fastckpt.spot import handlers
from fastckpt.spot.notice import Notice

SLURM_WARNING_S = 60.0  # `sbatch --signal` without a time sends it this long before the end
_LONGEST_WARNING_S = 3600.0


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
    """Signals such as SIGTERM. Only the main thread can set handlers. Earlier handlers are called after ours, and `close` puts them back.

    Sources may be closed in any order. A source that nobody holds any more counts as closed.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,), grace_s: float | None = None) -> None:
        """grace_s: seconds that the launcher gives before it kills; default: FASTCKPT_SIGTERM_GRACE_S, or 30, as with Kubernetes and
        torchrun.
        """
        self._watch(signals)
        self._grace_s = _sigterm_grace_s() if grace_s is None else grace_s
        self._received: list[tuple[int, float]] = []
        self._returned = 0
        self.pid = os.getpid()
        self.at_once: Callable[[], None] | None = None
        """Called in the signal's handler after the signal was noted, for work that cannot wait for the next poll. Takes no lock and raises
        nothing.
        """

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
        # Appending is one step of the interpreter: it needs no lock, which the interrupted code could hold.
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
        """Put the previous handlers back, unless other sources still listen or somebody has set another handler since. Outside the main
        thread, handlers stay and only pass the signal on.
        """
        for number in self._signals:
            handlers.remove(number, self)


class SlurmSource(SignalSource):
    """SIGTERM, and the earlier SIGUSR1 of `sbatch --signal=USR1@seconds`, unless the process uses SIGUSR1 for something else."""

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
        # If SIGUSR1 is sent long before the end, it announces a preemption.
        return left_s if 0 < left_s <= _LONGEST_WARNING_S else SLURM_WARNING_S
