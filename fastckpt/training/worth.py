"""Which bytes of a base are best kept where memory is short: those of the roles whose differences have saved most. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

_UNKNOWN = 0.25
"""What is expected of a role that was never tried: whole fp32 states of AdamW save 20 to 30 %."""
_FORGOTTEN = 0.05
"""In each save that did not try a role, so much of what is known of it: after some 30 saves first moments are tried again."""


class Worth:
    """See the module. One thread at a time."""

    def __init__(self) -> None:
        self._saved: dict[str, float] = {}

    def learn(self, roles: Sequence[str], saved: Mapping[int, float]) -> None:
        """A save has ended. roles: of its chunks. saved: see `Uploaded`."""
        if not saved:
            return
        sums, n_chunks = dict[str, float](), Counter[str]()
        for chunk, part in saved.items():
            role = roles[chunk]
            sums[role] = sums.get(role, 0.0) + part
            n_chunks[role] += 1
        for role in {*self._saved, *sums}:
            if role in sums:
                self._saved[role] = sums[role] / n_chunks[role]
            else:
                self._saved[role] += _FORGOTTEN * (_UNKNOWN - self._saved[role])

    def of(self, role: str) -> float:
        """The part of its full stored bytes that a chunk of this role is likely to save if its bytes are kept."""
        return self._saved.get(role, _UNKNOWN)


__all__ = ["Worth"]
