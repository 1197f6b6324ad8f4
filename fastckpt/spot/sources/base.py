"""The interface between the watcher and a source of notices."""

from __future__ import annotations

from typing import Protocol

from fastckpt.spot.notice import Notice


class NoticeSource(Protocol):
    """An object that knows when the machine will go.

    `poll` may raise: the watcher then treats the source as blind, reports that, and asks again.
    """

    name: str

    def poll(self, now_s: float) -> list[Notice]:
        """Return the notices that were not returned before.

        Threads: called by one thread, every few seconds.

        Args:
            now_s: time.monotonic(), to which a notice's `deadline_s` refers.
        """
