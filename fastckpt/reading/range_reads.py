"""Many ranged reads under way at once, into buffers of its own; the slowest are made twice.

    submit(range) ─→ queue ─→ threads: read into a buffer ─→ the first attempt that is whole: use(range, bytes) ─→ buffers free
                                 └ slow? an idle thread reads the same range into another buffer

A second attempt (a hedge) never shares memory with the first, and none of a range's buffers is used again before all its attempts have
ended: the one that lost may write until then. Nobody waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastckpt._types import U8
from fastckpt.host.pages import fresh_pages
from fastckpt.host.threads import start
from fastckpt.reading.hedging import Hedging
from fastckpt.reading.ranges import Range

_KEPT_DURATIONS = 256
Read = Callable[[Range, U8], None]
Use = Callable[[Range, "U8 | BaseException"], None]


@dataclass(eq=False)
class _Wanted:
    """A range, and the attempts to read it."""

    range: Range
    began_s: float = 0.0
    buffers: list[U8] = field(default_factory=list)
    attempts: int = 0
    reading: int = 0
    """Attempts that have not ended."""
    is_settled: bool = False
    """An attempt has succeeded, or all have failed."""
    is_in_use: bool = False
    """`use` has not returned."""


class RangeReads:
    """See the module. `submit` and `close` are for one thread; its 14 attributes are the queue, the reads under way, and what is free."""

    def __init__(
        self,
        read: Read,
        use: Use,
        *,
        at_once: int,
        buffers_bytes: int,
        hedging: Hedging | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            read: fills a buffer from a range; called on many threads at once.
            use: takes a range with its bytes, or with the error of the read; called once for each range, on the thread that has read it.
                The bytes are valid until it returns.
            at_once: most reads under way, hedges included.
            buffers_bytes: most memory of buffers; a range that is longer is read alone.
            hedging: when a read is made a second time. None: never.
            clock: seconds.
        """
        self._read, self._use = read, use
        self._at_once, self._buffers_bytes = at_once, buffers_bytes
        self._hedging, self._clock = hedging, clock
        self._changed = threading.Condition()
        self._queue: deque[_Wanted] = deque()
        self._under_way: set[_Wanted] = set()
        """Ranges that somebody reads or uses."""
        self._free: list[U8] = []
        self._held_bytes = 0
        """Memory of all buffers, the free ones too."""
        self._ended_s: deque[float] = deque(maxlen=_KEPT_DURATIONS)
        self._counts = {"threads": 0, "idle": 0, "reads": 0, "hedges": 0}
        self._is_closed = False

    def submit(self, range_: Range) -> None:
        """Read a range as soon as there is room. Without threads, because the interpreter ends, it is read at once, on this thread."""
        with self._changed:
            self._queue.append(_Wanted(range_))
            if self._counts["idle"] >= len(self._queue) or self._counts["threads"] >= self._at_once:
                self._changed.notify()
                return
            self._counts["threads"] += 1
        if not start(threading.Thread(target=self._work, name="fastckpt-read", daemon=True)):
            with self._changed:
                self._counts["threads"] -= 1
                alone = not self._counts["threads"]
            if alone:
                self._work(until_empty=True)

    def close(self) -> None:
        """Drop what has not begun, and wait for what is in use. Reads that are still under way are not waited for: nobody needs them, as an
        error has ended the load, or another attempt was faster. A server may keep them for minutes.
        """
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(one.is_in_use for one in self._under_way))
            self._free.clear()

    def _work(self, until_empty: bool = False) -> None:
        try:
            while (attempt := self._next(until_empty)) is not None:
                self._attempt(*attempt)
                del attempt  # otherwise the last buffer would live until the next range comes
        finally:
            with self._changed:
                self._counts["threads"] -= 1 - until_empty
                self._changed.notify_all()

    def _next(self, until_empty: bool) -> tuple[_Wanted, U8] | None:
        """Wait for something to read, and for a buffer. None: there will be nothing more."""
        with self._changed:
            while not self._is_closed:
                if self._queue and (buffer := self._buffer_for(self._queue[0].range)) is not None:
                    self._counts["reads"] += 1
                    return self._begin(self._queue.popleft(), buffer)
                if until_empty:
                    return None
                slow, wait_s = self._slow()
                if slow is not None and (buffer := self._buffer_for(slow.range)) is not None:
                    self._counts["hedges"] += 1
                    return self._begin(slow, buffer)
                self._counts["idle"] += 1
                self._changed.wait(wait_s)
                self._counts["idle"] -= 1
            return None

    def _begin(self, wanted: _Wanted, buffer: U8) -> tuple[_Wanted, U8]:
        if not wanted.attempts:
            wanted.began_s = self._clock()
        wanted.attempts += 1
        wanted.reading += 1
        wanted.buffers.append(buffer)
        self._under_way.add(wanted)
        return wanted, buffer

    def _buffer_for(self, range_: Range) -> U8 | None:
        """A free buffer that is long enough, or a new one. None: there is no room now."""
        n_bytes = range_.stop - range_.start
        fitting = [buffer for buffer in self._free if buffer.size >= n_bytes]
        if fitting:
            found = min(fitting, key=lambda buffer: buffer.size)
            self._free = [buffer for buffer in self._free if buffer is not found]
            return found
        while self._free and self._held_bytes + n_bytes > self._buffers_bytes:
            self._held_bytes -= self._free.pop().size
        if self._held_bytes and self._held_bytes + n_bytes > self._buffers_bytes:
            return None
        self._held_bytes += n_bytes
        return fresh_pages(n_bytes)[:n_bytes] if n_bytes else np.empty(0, np.uint8)

    def _slow(self) -> tuple[_Wanted | None, float | None]:
        """A read that is to be made a second time now; else the seconds until one may be."""
        if self._hedging is None or not self._hedging.allows(self._counts["hedges"], self._counts["reads"]):
            return None, None
        candidates = [wanted for wanted in self._under_way if wanted.attempts == 1 and not wanted.is_settled]
        if not candidates:
            return None, None
        oldest = min(candidates, key=lambda wanted: wanted.began_s)
        left_s = oldest.began_s + self._hedging.slow_after_s(list(self._ended_s)) - self._clock()
        return (oldest, None) if left_s <= 0 else (None, left_s)

    def _attempt(self, wanted: _Wanted, buffer: U8) -> None:
        error: BaseException | None = None
        part = buffer[: wanted.range.stop - wanted.range.start]
        began_s = self._clock()
        try:
            self._read(wanted.range, part)
        except BaseException as raised:  # given to whoever wants the range
            error = raised
        with self._changed:
            wanted.reading -= 1
            if error is None:
                self._ended_s.append(self._clock() - began_s)
            # After an error another attempt may still succeed.
            is_mine = not wanted.is_settled and (error is None or not wanted.reading)
            wanted.is_settled |= is_mine
            if is_mine:
                wanted.is_in_use = not self._is_closed
        try:
            if is_mine and wanted.is_in_use:
                self._use(wanted.range, part if error is None else error)
        finally:
            with self._changed:
                if is_mine:
                    wanted.is_in_use = False
                if self._may_free(wanted):
                    self._free += wanted.buffers
                    wanted.buffers.clear()
                if not wanted.reading and not wanted.is_in_use:
                    self._under_way.discard(wanted)
                self._changed.notify_all()

    def _may_free(self, wanted: _Wanted) -> bool:
        """Whether nobody writes to a range's buffers any more, or reads them."""
        return not wanted.reading and not wanted.is_in_use
