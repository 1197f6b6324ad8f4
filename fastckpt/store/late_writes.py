"""Writes of this process that ended without an answer: they may still arrive, and then they overwrite what was written after them.

A store has no way to take a request back. So whoever overwrites the same object later says that an older state may come over it.
"""

from __future__ import annotations

import time

_FORGET_S = 2 * 3600.0
"""As long as a write that failed at its client may take effect (docs/guarantees.md, A1)."""

# Without a lock, which a fork could find taken: each operation on it is whole by itself.
_ended_s: dict[tuple[str, str], float] = {}


def note(url: str, key: str) -> None:
    """A write of this object has ended, and nobody knows how."""
    now = time.monotonic()
    for one, ended_s in list(_ended_s.items()):
        if now - ended_s > _FORGET_S:
            _ended_s.pop(one, None)
    _ended_s[url, key] = now


def age_s(url: str, key: str) -> float | None:
    """How many seconds ago the last such write of the object ended; None: there is none that could still arrive."""
    ended_s = _ended_s.get((url, key))
    if ended_s is None or (age := time.monotonic() - ended_s) > _FORGET_S:
        return None
    return age
