"""Remembers writes of this process that ended without an answer: they may still arrive, and then they overwrite newer writes.

A store cannot cancel a request. So a later write of the same object warns that an older state may still replace it.
"""

from __future__ import annotations

import time

_FORGET_S = 2 * 3600.0
"""Time for which a write that failed at its client may still take effect (docs/guarantees.md, A1)."""

# Without a lock, because a fork could leave it locked. Each operation on it is atomic by itself.
_ended_s: dict[tuple[str, str], float] = {}


def note(url: str, key: str) -> None:
    """Note that a write of this object has ended with an unknown result."""
    now = time.monotonic()
    for one, ended_s in list(_ended_s.items()):
        if now - ended_s > _FORGET_S:
            _ended_s.pop(one, None)
    _ended_s[url, key] = now


def age_s(url: str, key: str) -> float | None:
    """Seconds since the last such write of the object ended; None if there is none that could still arrive."""
    ended_s = _ended_s.get((url, key))
    if ended_s is None or (age := time.monotonic() - ended_s) > _FORGET_S:
        return None
    return age
