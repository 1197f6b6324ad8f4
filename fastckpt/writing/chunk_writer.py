"""What all writers of chunks have in common: the records, equal chunks, and what the index says of the writer."""

from __future__ import annotations

import numpy as np

from fastckpt import codec, events
from fastckpt.format import directory, records
from fastckpt.format.repository_records import writer
from fastckpt.format.sealed_state import SealedState


class ChunkWriter:
    """The chunks of a state on their way to storage. Used once. `enter` and `earlier` are for one thread at a time."""

    def __init__(self, sealed: SealedState, target: str) -> None:
        self._sealed, self._source, self.chunks = sealed, sealed.source, sealed.chunks
        self._target = target
        self._rows = bytearray(records.RECORD_BYTES * len(self.chunks))
        self.records: records.Records = np.frombuffer(self._rows, records.LAYOUT)
        self._written: dict[tuple[bytes, int], int] = {}
        """(digest, raw bytes) of each chunk that is stored → the number of its record."""

    def tell_start(self, skeleton_s: float) -> None:
        """Emit SaveStarted. skeleton_s: seconds that the capture took."""
        events.emit(
            events.SaveStarted(
                target=self._target,
                raw_bytes=self._sealed.own_bytes,
                chunks=len(self.chunks),
                storages=len(self._sealed.storages),
                skeleton_s=skeleton_s,
            )
        )

    def is_stored(self, number: int, found: codec.Encoded) -> bool:
        """Whether a chunk needs no stored bytes of its own, as an equal one has them. Then its record is complete."""
        earlier = self._written.get((found.digest, self.chunks[number].n_bytes))
        if earlier is None:
            return False
        size = records.RECORD_BYTES
        self._rows[number * size : (number + 1) * size] = self._rows[earlier * size : (earlier + 1) * size]
        return True

    def enter(self, number: int, found: codec.Encoded, file: int = 0, offset: int = 0) -> None:
        """Complete the record of a chunk. file and offset: where its stored bytes are, if there are any."""
        n_bytes, stored_bytes = self.chunks[number].n_bytes, len(found.stored)
        records.fill(
            self._rows,
            number,
            found.transform,
            found.lane_bytes,
            found.pack_bits,
            file,
            offset,
            stored_bytes,
            n_bytes,
            found.digest,
            found.crc64nvme,
            found.parameter,
        )
        if stored_bytes:
            self._written[found.digest, n_bytes] = number

    def directory(self) -> directory.Directory:
        """Describe storages and tensors for the index. The caller adds step, rank, world and meta."""
        ours = writer()  # without the host: a container depends on none
        made_by = {
            "name": ours["name"],
            "version": ours["version"],
            "torch": self._sealed.torch,
            "python": ours["python"],
        }
        return directory.Directory(self._sealed.storages, self._sealed.tensors, writer=made_by)
