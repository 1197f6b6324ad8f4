"""Whether an upload may go on: a process that was stopped for long finds out whether another incarnation has taken over meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.errors import SupersededError
from fastckpt.host.boot_clock import seconds_since_boot
from fastckpt.repository.repository import Repository

_MOST_S = 600.0
"""The next incarnation deletes what a save has uploaded so far a grace (2 h) after it has found it. A vote is decided on a look at the
epochs that is no older than this.
"""


class StillOurs:
    """Called before every chunk, and before the vote, by any thread: `cancelled()`, or SupersededError. StoreError."""

    def __init__(self, repository: Repository, epoch: int, cancelled: Callable[[], bool]) -> None:
        self._repository, self._epoch, self._cancelled = repository, epoch, cancelled
        self._seen_s = seconds_since_boot()  # nothing of the save was there before

    def __call__(self) -> bool:
        now_s = seconds_since_boot()
        if now_s - self._seen_s > _MOST_S:
            newest = self._repository.newest_epoch()
            if newest > self._epoch:
                raise SupersededError(
                    f"{self._repository.url}: another incarnation of this job (epoch {newest}) has taken over from this one (epoch "
                    f"{self._epoch}) during a save, which is not committed. Stop this process"
                )
            self._seen_s = now_s
        return self._cancelled()
