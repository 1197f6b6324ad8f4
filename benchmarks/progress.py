"""How far a benchmark is, on stderr."""

from __future__ import annotations

import sys
import time


def bar(done: int, total: int, text: str) -> None:
    """Replaces the line of a terminal; the last one stays."""
    full = 24 * done // total
    end = "\n" if done == total else ""
    print(f"\r\033[K[{'#' * full}{'.' * (24 - full)}] {text}", end=end, file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal, one line per measurement elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        count = f"{self.done}/{self.total}, {left:.0f} s left"
        if self.live:
            bar(self.done, self.total, f"{count}  {text}")
        else:
            print(f"{count}: {text}", file=sys.stderr, flush=True)
