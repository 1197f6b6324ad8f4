"""Decides in which order a snapshot's chunks are copied, and where in host memory each one goes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.slots import Layout, lay_out, slab_limit
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk, Cuts

_MOST_BY_ROLE = 1.07
"""So much more memory may it take that each role has slabs of its own. In slabs of 64 MiB, chunks of 4 MiB waste a sixteenth at most."""


class DoesNotFit(Exception):
    """The budget is too small for this state, even when all other snapshots have ended."""


class CopyPlan(NamedTuple):
    """The order and the places of the copies of one state."""

    order: Sequence[int]
    """The numbers of all chunks, in the order of their copies."""
    n_first: int
    """Number of chunks at the beginning of `order` that are copied first, because their storages may change at any time."""
    layout: Layout
    """The slots of the chunks in `order`."""
    n_slabs: int
    """Number of slabs of the layout that must exist at the beginning: all, unless the state goes through a ring."""
    for_device: bool
    """Whether any chunk comes from a device."""

    @property
    def first_slabs(self) -> Sequence[int]:
        """Bytes of each slab that must exist at the beginning."""
        return self.layout.slab_bytes[: self.n_slabs]

    @property
    def is_ring(self) -> bool:
        """Whether slabs have to be used again while the snapshot is made."""
        return self.n_slabs < len(self.layout.slab_bytes)


def plan_copies(
    captured: Captured, cuts: Cuts, budget_bytes: int, fenced: FencedTensors | None, *, ring: bool
) -> CopyPlan:
    """Plan the copies of a state. DoesNotFit if the budget will never hold it.

    fenced: storages that need not be copied first; None: none need be copied first. ring: whether a state larger than the budget may be
    copied in parts.
    """
    chunks = cuts.chunks
    n_bytes = [chunk.n_bytes for chunk in chunks]
    for_device = any(captured.storages[chunk.pieces[0].storage].device is not None for chunk in chunks)
    limit = slab_limit(budget_bytes, MAX_RAW_BYTES if sum(n_bytes) > MAX_RAW_BYTES else max(n_bytes, default=1))
    if not limit:
        raise DoesNotFit
    first = [] if fenced is None else [n for n, chunk in enumerate(chunks) if not is_fenced(captured, chunk, fenced)]
    is_first = set(first)
    order = [*first, *(n for n in range(len(chunks)) if n not in is_first)]
    sizes = [n_bytes[n] for n in order]
    layout = lay_out(sizes, limit)
    by_role = lay_out(sizes, limit, [chunks[n].role for n in order])
    # A ring uses its slabs again in the order of the copies, so it never has them by role.
    if sum(by_role.slab_bytes) <= min(budget_bytes, _MOST_BY_ROLE * sum(layout.slab_bytes)):
        layout = by_role
    needed = len(layout.slab_bytes)
    if sum(layout.slab_bytes) > budget_bytes:
        # Slabs for everything that is copied first, and two slabs through which the rest goes round.
        needed = min(needed, 2 + (layout.slots[len(first) - 1].slab + 1 if first else 0))
        if not ring or sum(layout.slab_bytes[:needed]) > budget_bytes:
            raise DoesNotFit
    return CopyPlan(order, len(first), layout, needed, for_device)


def is_fenced(captured: Captured, chunk: Chunk, fenced: FencedTensors) -> bool:
    """Whether nothing changes a chunk before the fence."""
    return all(captured.addresses[piece.storage] in fenced.addresses for piece in chunk.pieces)
