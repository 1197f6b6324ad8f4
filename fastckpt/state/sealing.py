"""The last that a save asks of the rooms that know torch: a captured state becomes what `writing` takes."""

from __future__ import annotations

from typing import Protocol

from fastckpt.format.directory import StorageEntry
from fastckpt.format.sealed_state import ChunkSource, SealedChunk, SealedState
from fastckpt.host import cycle_collector
from fastckpt.host.torch_names import TORCH_VERSION
from fastckpt.state.capture import Captured
from fastckpt.state.chunking import Cuts
from fastckpt.state.chunks import LiveChunks


class CutSource(ChunkSource, Protocol):
    """A source that knows where its chunks were cut."""

    cuts: Cuts


def seal(captured: Captured, source: CutSource | None = None) -> SealedState:
    """Fix the form of a state: what is entered in `captured` later (shares, prints) is not saved. No bytes are read.

    source: gives its chunks, and belongs to whoever writes them from now on. None: they are read from the state itself, whose owner keeps
    it as it is until the save is done. Any thread; 1 µs for each storage.
    """
    source = source or LiveChunks(captured)
    cuts, shares, prints = source.cuts, captured.shares, captured.prints
    with cycle_collector.held_off():
        storages = tuple(
            StorageEntry(
                s.dtype,
                s.n_bytes,
                s.location,
                cuts.extents[n] if s.has_data else None,
                shares.get(n, ()) if s.has_data else (),
                prints.get(n, ""),
            )
            for n, s in enumerate(captured.storages)
        )
        chunks = tuple(SealedChunk(chunk.n_bytes, chunk.element) for chunk in cuts.chunks)
        tensors = tuple(captured.tensors)
    return SealedState(captured.skeleton, storages, tensors, chunks, source, TORCH_VERSION, captured.groups)
