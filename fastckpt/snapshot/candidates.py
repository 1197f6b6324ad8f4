"""Decides which chunks of device memory get a fingerprint, and which are not copied before theirs is known. Pure.

A fingerprint costs the device a fraction of a millisecond for each 100 MB; a chunk whose copy waits for it costs the training thread
perhaps a wait at the fence. So a state that training changes entirely should pay nothing after the first saves, and one that is mostly
frozen should never be copied again:

    fingerprint   all chunks in the first saves and in a few later ones, else those that a save may find unchanged
    copy waits    if torch has counted no write to the chunk's storages since the base; or, behind the fence, if it was found unchanged
                  lately though torch had counted a write, as happens to rows of an embedding
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int32]

LEARNING_SAVES = 3
"""So many saves of one form compare all chunks: two of them can be compared with the one before."""
LEARN_AGAIN_EVERY = 32
"""Saves from one look at all chunks to the next; each takes two saves, because the first has nothing to compare with."""
LATELY_SAVES = 4
NEVER = 1 << 30


class History(NamedTuple):
    """What earlier saves of the same form have found."""

    n_saves: int
    """Saves of this form so far."""
    since_unchanged: Counts
    """For each chunk, the number of saves since it was last found unchanged; NEVER."""
    deceives: Flags
    """Chunks that were last found changed though torch had counted no write: that of a DTensor, say, is not counted for its shard."""

    @staticmethod
    def none(n_chunks: int) -> History:
        """Of a form that was never saved."""
        return History(0, np.full(n_chunks, NEVER, np.int32), np.zeros(n_chunks, bool))

    def after(self, unwritten: Flags, compared: Flags, unchanged: Flags) -> History:
        """After one more save.

        unwritten: torch has counted no write to them since the base. compared: their fingerprint, and the base's, are known. unchanged:
        these were equal.
        """
        later = np.minimum(self.since_unchanged, NEVER - 1) + 1
        since = np.where(unchanged, 0, later).astype(np.int32)
        return History(self.n_saves + 1, since, np.where(compared, unwritten & ~unchanged, self.deceives))

    @property
    def was_unchanged_lately(self) -> Flags:
        """Of each chunk."""
        return self.since_unchanged < LATELY_SAVES

    @property
    def looks_at_all(self) -> bool:
        """Whether the next save takes the fingerprints of all chunks."""
        return self.n_saves < LEARNING_SAVES or self.n_saves % LEARN_AGAIN_EVERY < 2


def get_fingerprint(history: History, unwritten: Flags) -> Flags:
    """Which chunks get a fingerprint. unwritten: torch has counted no write to them since the base."""
    return history.was_unchanged_lately | (unwritten & ~history.deceives) | history.looks_at_all


def wait_for_theirs(history: History, unwritten: Flags, fenced: Flags, has_known: Flags) -> Flags:
    """Which chunks are not copied before their fingerprint is known.

    fenced: nothing changes them before the fence; the bytes of the others may change at once, so that the guess has to be a good one.
    has_known: the base has a fingerprint of them.
    """
    return has_known & ((unwritten & ~history.deceives) | (fenced & history.was_unchanged_lately))
