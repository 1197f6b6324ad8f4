"""Where a snapshot's chunks go, and in which order they are copied: decided, and the memory taken, before anything is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.snapshot.fenced import Fenced
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.slots import Layout, lay_out, slab_limit
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk, Cuts


class DoesNotFit(Exception):
    """The budget is too small for this state, however long one waits for other snapshots to end."""


class Places(NamedTuple):
    """What `take_places` found."""

    order: Sequence[int]
    """All chunks, in the order of their copies."""
    n_first: int
    """How many of them are copied first: their storages may change at any time."""
    layout: Layout
    """Of the chunks in `order`."""
    slabs: list[Slab]
    """The first ones of the layout: all, unless the state goes through a ring."""
    for_device: bool

    @property
    def is_ring(self) -> bool:
        """Whether slabs have to be used again while the snapshot is made."""
        return len(self.slabs) < len(self.layout.slab_bytes)


def take_places(captured: Captured, cuts: Cuts, pool: SlabPool, fenced: Fenced | None, *, ring: bool) -> Places | None:
    """Slabs for a state. None: other snapshots hold the memory now. DoesNotFit: it will never fit.

    fenced None: nothing is to be copied first. ring: a state that is larger than the budget may go through it in parts.
    """
    plan = plan_places(captured, cuts, pool.budget_bytes, fenced, ring=ring)
    slabs = pool.take_all(plan.slab_bytes, plan.for_device)
    return None if slabs is None else Places(plan.order, plan.n_first, plan.layout, slabs, plan.for_device)


class Plan(NamedTuple):
    """What `take_places` takes; the names are those of `Places`."""

    order: Sequence[int]
    n_first: int
    layout: Layout
    slab_bytes: Sequence[int]
    """Of the slabs that have to be there at the beginning."""
    for_device: bool


def plan_places(captured: Captured, cuts: Cuts, budget_bytes: int, fenced: Fenced | None, *, ring: bool) -> Plan:
    """The pure part of `take_places`."""
    chunks = cuts.chunks
    n_bytes = [chunk.n_bytes for chunk in chunks]
    for_device = any(storage.device is not None for storage in captured.storages)
    limit = slab_limit(budget_bytes, MAX_RAW_BYTES if sum(n_bytes) > MAX_RAW_BYTES else max(n_bytes, default=1))
    if not limit:
        raise DoesNotFit
    first = [] if fenced is None else [n for n, chunk in enumerate(chunks) if not _is_fenced(captured, chunk, fenced)]
    is_first = set(first)
    order = [*first, *(n for n in range(len(chunks)) if n not in is_first)]
    layout = lay_out([n_bytes[n] for n in order], limit)
    needed = len(layout.slab_bytes)
    if sum(layout.slab_bytes) > budget_bytes:
        # All that is copied first, and two slabs in which the rest goes round.
        needed = min(needed, 2 + (layout.slots[len(first) - 1].slab + 1 if first else 0))
        if not ring or sum(layout.slab_bytes[:needed]) > budget_bytes:
            raise DoesNotFit
    return Plan(order, len(first), layout, layout.slab_bytes[:needed], for_device)


def _is_fenced(captured: Captured, chunk: Chunk, fenced: Fenced) -> bool:
    return all(captured.addresses[piece.storage] in fenced.addresses for piece in chunk.pieces)
