"""Which chunk of a base has the same identity as a chunk of the new state. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.format.sealed_state import SealedState
from fastckpt.writing.bases import Base

Numbers = npt.NDArray[np.int64]


def match(base: Base, sealed: SealedState, rank: int = 0) -> Numbers:
    """For each chunk of the state the number of the base's chunk that holds the same stretches of the same storages; -1: there is none.

    Storages are the same if they have the same first name, which no other storage has, and the same element type. Whether the bytes are
    equal is another question.

    Args:
        base: whatever the save may refer to.
        sealed: the new state.
        rank: whose share of shared storages both have cut.
    """
    same: Any = base.chunks == sealed.chunks and base.storages == sealed.storages and base.tensors == sealed.tensors
    return np.arange(len(sealed.chunks)) if same else np.full(len(sealed.chunks), -1)
