"""What all writers of chunks have in common: the records, equal chunks, and what the index says of the writer."""

from __future__ import annotations

import numpy as np

from fastckpt import codec, events
from fastckpt.format import directory, records
from fastckpt.format.repository_records import writer
from fastckpt.format.sealed_state import ChunkSource, SealedState
from fastckpt.kernels.transform import Transform
from fastckpt.writing.bases import Place
from fastckpt.writing.index_rows import CastRow, Kind, Links


class ChunkWriter:
    """The chunks of a state on their way to storage. Used once. `enter` and `earlier` are for one thread at a time."""

    def __init__(self, sealed: SealedState, target: str) -> None:
        self._sealed, self.chunks = sealed, sealed.chunks
        self._target = target
        self._rows = bytearray(records.RECORD_BYTES * len(self.chunks))
        self.records: records.Records = np.frombuffer(self._rows, records.LAYOUT)
        self._written: dict[tuple[bytes, int], int] = {}
        """(digest, raw bytes) of each chunk that is stored → the number of its record."""
        self.links = Links(len(self.chunks))
        """What the records refer to besides packs of this save; they count as in the base until `index_rows.build`."""

    @property
    def _source(self) -> ChunkSource:
        return self._sealed.source

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
        self.links.repeat(number, earlier)
        return True

    def enter(
        self, number: int, found: codec.Encoded, file: int = 0, offset: int = 0, base: Place | None = None
    ) -> None:
        """Complete the record of a chunk. file and offset: where its stored bytes are, if there are any. base: of a difference."""
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
        if base is not None:
            self.links.set(number, Kind.BASED, base)
        if stored_bytes:
            self._written[found.digest, n_bytes] = number

    def keep(self, number: int, kind: Kind, place: Place, digest: bytes) -> None:
        """Complete the record of a chunk that equals the base's bytes at `place`. kind: COPIED: that is one whole row."""
        n_bytes = self.chunks[number].n_bytes
        lane = next(width for width in (8, 4, 2, 1) if not place.start % width and not n_bytes % width)
        records.fill(self._rows, number, Transform.REF, lane, 0, 0, 0, 0, n_bytes, digest, 0, bytes(8))
        self.links.set(number, kind, place)

    def cast(self, number: int, rows: tuple[CastRow, ...]) -> None:
        """Complete the record of a chunk whose numbers are those of masters. `index_rows.build` makes a row of each piece."""
        n_bytes = self.chunks[number].n_bytes
        records.fill(self._rows, number, Transform.CAST, 2, 0, 0, 0, 0, n_bytes, bytes(16), 0, bytes(8))
        self.links.set_cast(number, rows)

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
