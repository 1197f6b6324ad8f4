"""A limit for what saves upload a second: a bucket of tokens, one for each byte.

Providers give machines credits for bursts: saves that use them up leave the last one, after a notice, with the base rate. The bucket
fills at the limit, and holds ten seconds of it, or one pack if that is more. A put begins once the bucket is not empty, and takes a token
for each of its bytes; the bucket may go below zero, so over time the limit holds, whatever the lengths of packs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fastckpt.options import MAX_PACK_BYTES

_BURST_S = 10.0
_LOOK_S = 0.25
"""Interval at which a wait looks whether there is a hurry now."""


class RateLimit:
    """See the module. Any thread; those that wait are let through one after the other."""

    def __init__(
        self,
        bytes_per_s: float,
        in_a_hurry: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """bytes_per_s: 0 for no limit. in_a_hurry: while it says True there is no limit, and nothing is counted."""
        self._bytes_per_s, self._in_a_hurry = bytes_per_s, in_a_hurry
        self._clock, self._sleep = clock, sleep
        self._most = max(_BURST_S * bytes_per_s, float(MAX_PACK_BYTES))
        self._tokens, self._at_s = self._most, clock()
        self._lock = threading.Lock()

    def lift(self) -> None:
        """From now on there is no limit: the run is over, and only its last saves are waited for."""
        self._bytes_per_s = 0.0

    def wait(self, n_bytes: int, look: Callable[[], None] = lambda: None) -> float:
        """Wait until so many bytes may be sent. Returns the seconds that it took.

        look: called now and then while waiting; what it raises ends the wait, and nothing is counted.
        """
        if not self._bytes_per_s:
            return 0.0
        begun_s = self._clock()
        while self._bytes_per_s and not self._in_a_hurry():
            look()
            with self._lock:
                left_s = self._take(n_bytes)
            if not left_s:
                break
            self._sleep(min(left_s, _LOOK_S))
        return self._clock() - begun_s

    def _take(self, n_bytes: int) -> float:
        """Take tokens, and return 0; or the seconds until there are any."""
        now_s, bytes_per_s = self._clock(), self._bytes_per_s
        self._tokens = min(self._most, self._tokens + (now_s - self._at_s) * bytes_per_s)
        self._at_s = now_s
        if self._tokens <= 0 and bytes_per_s:
            return max(-self._tokens / bytes_per_s, 1e-3)
        self._tokens -= n_bytes
        return 0.0
