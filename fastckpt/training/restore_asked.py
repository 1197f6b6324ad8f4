"""What a caller says of a restore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

Reassign: TypeAlias = Callable[[str, Sequence[Any], int, int], Any]
"""(name of an object, its state on each saved rank, rank, world) → the state for this rank; None: the object stays as it is."""


class RestoreAsked(NamedTuple):
    """How a checkpoint is to be restored: see `Checkpointer.restore`."""

    weights_only: bool = True
    strict: bool = True
    atomic: bool = False
    overlap: bool = False
