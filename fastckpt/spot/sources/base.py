"""What the watcher asks of a source of notices."""

from __future__ import annotations

from typing import Protocol

from fastckpt.spot.notice import Notice


class NoticeSource(Protocol):
    """Something that knows when the machine goes. May raise in `poll`: the watcher then takes it for blind, says so, and asks again."""

    name: str

    def poll(self, now_s: float) -> list[Notice]:
        """Return the notices that were not returned before.

        Threads: called by one thread, every few seconds.

        Args:
            now_s: time.monotonic(), to which a notice's `deadline_s` refers.
        """
