"""Exports a checkpoint of many ranks as one container: what `fastckpt.load` makes of it, but never all of it in memory.

    objects of rank 0 ──→ large tensors stand over memory that nobody touches ──→ capture: skeleton, names, where to cut
    wholes of all ranks ──→ put together one after another ──→ encoder ──→ sink

Tensors are on the CPU in the file: it may be loaded anywhere. It is encoded anew, since chunks of one rank are no chunks of the whole.
"""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from fastckpt._types import U8, Progress
from fastckpt.errors import CorruptCheckpointError, RestoreError
from fastckpt.format.repository_records import Commit
from fastckpt.host.pages import fresh_pages
from fastckpt.host.sink import abandoning
from fastckpt.options import Options
from fastckpt.reading.object_loader import load_object
from fastckpt.reading.whole_contents import WholeContents
from fastckpt.reading.whole_objects import Swaps, left_out, put_in, swaps_for
from fastckpt.repository.repository import Repository
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.state import Captured, capture
from fastckpt.state.chunks import LiveChunks
from fastckpt.state.sealing import seal
from fastckpt.upkeep.export import ADVICE
from fastckpt.writing.container import start_workers, write
from fastckpt.writing.sinks import open_sink

_SMALL_BYTES = 1 << 20  # read with the objects: one by one they would cost a request each


class Exported(NamedTuple):
    """What was written."""

    n_bytes: int
    left_out: str
    """What ranks had and the file has not, in words; "" if there is nothing."""


def export_whole_to(
    path: str,
    repository: Repository,
    commit: Commit,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write a checkpoint of many ranks to a path, which is replaced.

    Takes 256 MiB of tensors ahead, the encoder's buffers, the largest tensor twice, and the indexes of all ranks. Runs no foreign code:
    what `fastckpt.load` refuses by default is refused here.

    Args:
        path: of the file.
        repository: where the checkpoint is.
        commit: its record.
        options: None for the defaults. `max_load_bytes` does not count: the state is never in memory.
        progress: called with raw bytes done and raw bytes in all.

    Raises:
        RestoreError: the saved objects cannot be put together as a whole, or not without code of somebody else.
        CorruptCheckpointError: lists damage, with the names of the tensors; nothing was written.
        StoreError, OSError: the store or the path failed.
    """
    options = options or Options()
    sink = open_sink(path)
    with abandoning(sink):
        try:
            contents = WholeContents(
                SavedRanks(repository.store, commit), options, repository.location(commit.checkpoint)
            )
            captured, virtual, words = _captured(contents)
            sealed = seal(captured, _PutTogether(captured, contents, virtual, progress))
            pool = start_workers(sealed.n_bytes, options)
            n_bytes = write(sealed, sink, path, options, pool, 0.0, commit.save.step)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(error.source, error.damage, ADVICE) from error
    return Exported(n_bytes, words)


def _captured(contents: WholeContents) -> tuple[Captured, Mapping[int, int], str]:
    """The state with memory that was never touched in place of large tensors. By address, the storages that belong there."""
    own = contents.ranks.whole(0)
    listed = own.directory.storages
    swaps = swaps_for(
        contents,
        own.directory,
        lambda e: (
            e.kind in ("tensor", "parameter")
            and listed[e.storage].n_bytes >= _SMALL_BYTES
            and listed[e.storage].extents is not None
        ),
    )
    how: dict[str, Any] = {
        "pickle_module": pickle,
        "weights_only": True,
        "load_args": {"encoding": "utf-8"},
        "beyond_torch": True,
    }
    wanted = [n for n in range(len(listed)) if n not in swaps.unread]
    try:
        state = load_object(own, contents.options, contents.threads, map_location="cpu", wanted=wanted, **how)
        virtual = _put_in_untouched(contents, state, swaps)
        words = left_out(contents, state, swaps, **how)
    except pickle.UnpicklingError as error:
        raise RestoreError(
            f"{contents.name} holds objects that could run code, so they are not made whole here: {str(error).strip().splitlines()[-1]} "
            "`fastckpt restore --rank` copies what one rank had as it is"
        ) from error
    return capture(state, pickle, 2), virtual, words


def _put_in_untouched(contents: WholeContents, state: Any, swaps: Swaps) -> dict[int, int]:
    virtual: dict[int, int] = {}

    def untouched(numbers: Sequence[int]) -> dict[int, UntypedStorage | None]:
        found: dict[int, UntypedStorage | None] = {}
        for number in numbers:
            storage = contents.directory.storages[number]
            found[number] = None if storage.extents is None else _untouched(storage.n_bytes)
            if storage.n_bytes and storage.extents is not None:
                virtual[found[number].data_ptr()] = number  # type: ignore[union-attr]
        return found

    put_in(contents, state, swaps, untouched)
    return virtual


def _untouched(n_bytes: int) -> UntypedStorage:
    return torch.from_numpy(fresh_pages(n_bytes)).untyped_storage()


class _PutTogether(LiveChunks):
    """Chunks of tensors that are put together when the encoder comes to them, and dropped behind it."""

    def __init__(
        self, captured: Captured, contents: WholeContents, virtual: Mapping[int, int], progress: Progress
    ) -> None:
        """virtual: address → number in the contents, of what is not there yet."""
        super().__init__(captured)
        self._state, self._progress = captured, progress
        self._lock = threading.Lock()
        numbers = {n: virtual[address] for n, address in enumerate(captured.addresses) if address in virtual}
        uses = [piece.storage for chunk in self.cuts.chunks for piece in chunk.pieces if piece.storage in numbers]
        self._uses = Counter(uses)
        """Of what is not there yet, or not read to its end: how many pieces."""
        self._waiting = set(numbers)
        self._arrivals = self._arriving(contents, {n: numbers[n] for n in dict.fromkeys(uses)})
        self._done_bytes = 0

    def _arriving(self, contents: WholeContents, numbers: Mapping[int, int]) -> Iterator[int]:
        """Put each storage in its place, in order. Yields its number."""
        with contents.storages(list(numbers.values())) as storages:
            for own, number in numbers.items():
                storage = storages.take(number)
                self._state.owners[own], self._state.addresses[own] = storage, storage.data_ptr()
                del storage
                yield own

    def raw(self, number: int, scratch: U8) -> U8:
        """Waits until all of the chunk is there."""
        needed = {piece.storage for piece in self.cuts.chunks[number].pieces}
        with self._lock:
            while needed & self._waiting:
                self._waiting.remove(next(self._arrivals))
        return super().raw(number, scratch)

    def release(self, number: int) -> None:
        """Drops the tensors that were read to their ends."""
        chunk = self.cuts.chunks[number]
        with self._lock:
            for piece in chunk.pieces:
                self._uses[piece.storage] -= 1
                if not self._uses[piece.storage]:
                    self._state.owners[piece.storage] = None
        self._done_bytes += chunk.n_bytes
        self._progress(self._done_bytes, self._state.n_bytes)

    def close(self) -> None:
        """Stop reading."""
        close: Any = getattr(self._arrivals, "close", lambda: None)
        with self._lock:
            close()


__all__ = ["Exported", "export_whole_to"]
