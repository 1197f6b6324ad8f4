"""What whoever uploads takes, and all that it takes: a state whose form is fixed and whose bytes nobody changes any more.

    state, snapshot ─→ SealedState ─→ writing: packs and vote, or a container
    know torch                    knows no torch

The rows are those of the index that is being written, but for the records, which only the encoder knows. They are plain data, and pickle
as such: another process may upload what this one has sealed, if it brings a source of the same chunks.

Chunks are sealed one by one, and the whole at last: `raw` gives a chunk once its copy is there, while later ones are still being copied
and training goes on. So whoever uploads must not let anybody find what it has written before `confirm` has returned: that says that the
copies together are one state.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from fastckpt._types import U8
from fastckpt.format.directory import StorageEntry, TensorEntry
from fastckpt.format.element_types import ElementType
from fastckpt.format.shares import GroupClaim


class ChunkSource(Protocol):
    """The bytes of one state's chunks, in host memory. `raw` and `release` may be called by any thread, each chunk once, and in the order
    of their numbers unless `any_order`; neither of them for a chunk that is `known`.
    """

    @property
    def any_order(self) -> bool:
        """Whether chunks may be asked for in any order, and peeked at. False: memory holds only some of them at a time, and gets the next
        ones when those before them are released: who asks for a later one first waits for ever.
        """

    def known(self, number: int) -> bytes | None:
        """The digest of a chunk that was not copied, because it equals the base's chunk that it is matched with (`writing.matching`).

        Asked only by a save that has a base. None: `raw` has its bytes. May block. Raises what `raw` does.
        """

    def raw(self, number: int, scratch: U8) -> U8:
        """A chunk's bytes, either in `scratch`, which is large enough, or elsewhere. Nobody changes them until `release`. May block.

        Raises the error that has made the state invalid meanwhile.
        """

    def peek(self, number: int, scratch: U8) -> AbstractContextManager[U8 | None]:
        """Context with any chunk's bytes, before its `raw` or after its `release`, in `scratch` or elsewhere. Nobody changes them until it
        ends. None: they are not in memory (any more). May block. Raises what `raw` does.
        """

    def release(self, number: int) -> None:
        """The bytes are not needed any more."""

    def confirm(self) -> None:
        """To be called after all chunks have been read, before the vote. Raises the error that makes them invalid, if there is one."""

    def close(self) -> None:
        """Release all resources. May be called twice."""


class SealedChunk(NamedTuple):
    """One chunk of the source; its number is that of its record."""

    n_bytes: int
    element: ElementType


@dataclass(frozen=True)
class SealedState:
    """See the module. `state.sealing.seal` makes it."""

    skeleton: bytes
    storages: tuple[StorageEntry, ...]
    tensors: tuple[TensorEntry, ...]
    chunks: tuple[SealedChunk, ...]
    source: ChunkSource
    torch: str
    """The version of torch that has pickled the skeleton."""
    groups: tuple[GroupClaim, ...] = ()
    """What this rank holds alike with others, all of it."""

    @cached_property
    def n_bytes(self) -> int:
        """Raw bytes of all storages that have data."""
        return sum(storage.n_bytes for storage in self.storages if storage.extents is not None)

    @cached_property
    def own_bytes(self) -> int:
        """Those of them that this rank writes."""
        return sum(chunk.n_bytes for chunk in self.chunks)
