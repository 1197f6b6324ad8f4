"""A clock that goes on while the process is stopped and, where the system has one, while the machine sleeps."""

from __future__ import annotations

import time

_CLOCK = getattr(
    time, "CLOCK_BOOTTIME", None
)  # Linux; elsewhere the monotonic clock may stand still while the machine sleeps


def seconds_since_boot() -> float:
    """Seconds from some fixed moment; never runs backwards."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)
