"""Indexes whose chunks are relative to others, made by hand: chains, bases that lie in two rows, bases of several chunks, packs of many
saves.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.codec import frames
from fastckpt.format import container, directory, records
from fastckpt.format.digest import crc64nvme, digest
from fastckpt.format.directory import Directory, Extent, FileEntry, StorageEntry, TensorEntry
from fastckpt.kernels import kernels
from fastckpt.kernels.transform import HAS_BASE, HAS_FRAME, Transform
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource, ObjectSource
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.writing.container import index_and_footer


class Rows:
    """Rows of an index, each with its stored bytes in a pack."""

    def __init__(self) -> None:
        self.raws: list[U8] = []
        self._rows: list[Any] = []
        self._packs: dict[int, bytearray] = {}

    def add(
        self,
        raw: U8,
        transform: Transform = Transform.RAW,
        base: tuple[int, int] | None = None,
        *,
        pack: int = 0,
        lane_bytes: int = 4,
        pack_bits: int = 4,
        ours: bool = True,
        gap: int = 0,
    ) -> int:
        """Add a row. Returns its number.

        Args:
            raw: its raw bytes. Where the transform cannot take them, they are stored as they are.
            transform: how.
            base: row, and element in it.
            pack: number of the pack for its stored bytes.
            lane_bytes: of a frame or a REF.
            pack_bits: of SUBPACK.
            ours: whether a frame is made by our encoder, or by libzstd.
            gap: bytes of nobody in front of the stored bytes.
        """
        row = np.zeros(1, records.LAYOUT)[0]
        parameter, stored = bytes(8), raw.tobytes()
        if transform in HAS_BASE:
            assert base is not None
            parameter = np.array(base, "<u4").tobytes()
        made: bytes | None = None
        if transform in HAS_FRAME:
            made = _frame(raw, transform, self.base(base, raw.size, lane_bytes), lane_bytes, pack_bits, ours)
        elif transform is Transform.CONST:
            made, parameter = b"", raw[:lane_bytes].tobytes().ljust(8, b"\0")
        elif transform in (Transform.CAST, Transform.REF):
            made = b""
        if made is None:
            transform, lane_bytes, parameter, made = Transform.RAW, 1, bytes(8), stored
        data = self._packs.setdefault(pack, bytearray())
        row["transform"], row["lane_bytes"], row["raw_bytes"] = transform, lane_bytes, raw.size
        row["pack_bits"] = pack_bits if transform is Transform.SUBPACK else 0
        row["parameter"], row["digest"] = np.void(parameter), np.void(digest(raw))
        if made:
            data += bytes(gap)
            row["file"], row["offset"], row["stored_bytes"] = pack + 1, len(data), len(made)
            row["crc64nvme"] = crc64nvme(made)
            data += made
        self._rows.append(row)
        self.raws.append(raw.copy())
        return len(self.raws) - 1

    def base(self, base: tuple[int, int] | None, n_bytes: int, width: int) -> U8 | None:
        """The bytes from an element of a row on."""
        if base is None:
            return None
        found = np.concatenate(self.raws[base[0] : base[0] + 2])[base[1] * width :][:n_bytes]
        assert found.size == n_bytes, "a base ends too early"
        return found

    @property
    def records(self) -> Any:
        return np.array(self._rows, records.LAYOUT)

    def vote(self, store: Store, storages: Sequence[Sequence[Extent]]) -> Reader:
        """Put the packs, and open an index of these storages. Tensor n is storage n."""
        return Reader.open_vote(
            BytesSource(self.index(store, storages), "a vote"),
            lambda file: ObjectSource(store, file.key, file.n_bytes),
        )

    def index(self, store: Store, storages: Sequence[Sequence[Extent]]) -> bytes:
        """Put the packs. Returns the index."""
        numbers = sorted(self._packs)
        files = []
        for number in numbers:
            key = f"data/{1:06}-{number:012}-000/r00000/000000.pack"
            _put(store, key, bytes(self._packs[number]))
            files.append(FileEntry(key, len(self._packs[number]), crc64nvme(bytes(self._packs[number]))))
        table = self.records
        for row in range(len(table)):
            if table["file"][row]:
                table["file"][row] = numbers.index(int(table["file"][row]) - 1) + 1
        header = container.build_header(0)
        parts = [directory.build(directory_of(storages)), directory.build_file_table(files), table.tobytes(), b""]
        return header + b"".join(index_and_footer(header, 0, parts))

    def raw_of(self, extents: Sequence[Extent]) -> bytes:
        """The bytes of a storage."""
        found = b""
        for extent in extents:
            stop, row, part = len(found) + extent.n_bytes, extent.record, self.raws[extent.record][extent.offset :]
            while len(found) < stop:
                found += part[: stop - len(found)].tobytes()
                row += 1
                part = self.raws[row] if row < len(self.raws) else part[:0]
        return found


def _put(store: Store, key: str, data: bytes) -> None:
    if not isinstance(store, LocalStore):
        store.put(key, data)
        return
    path = Path(store._path(key))  # tests make many, and a store would wait for the disk each time
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def directory_of(storages: Sequence[Sequence[Extent]]) -> Directory:
    """A directory with a tensor of bytes for each storage."""
    entries, tensors = [], []
    for number, extents in enumerate(storages):
        n_bytes = sum(extent.n_bytes for extent in extents)
        entries.append(StorageEntry("uint8", n_bytes, "cpu", tuple(extents)))
        tensors.append(TensorEntry((f"t{number}",), "uint8", (n_bytes,), (1,), 0, number, "tensor", False))
    return Directory(tuple(entries), tuple(tensors))


def _frame(raw: U8, transform: Transform, base: U8 | None, lane_bytes: int, pack_bits: int, ours: bool) -> bytes | None:
    bits = pack_bits if transform is Transform.SUBPACK else 0
    if ours:
        found = codec.encode_as(codec.Coding(transform, bits), raw, base, lane_bytes)
        return None if found is None else bytes(memoryview(found.stored).cast("B"))
    stream = np.empty(2 * raw.size + 64, np.uint8)
    used = kernels().split(raw, base, transform, lane_bytes, bits, stream)
    return None if used is None else frames.compress(stream[:used].tobytes(), 1)


def world(seed: int, *, depth: int, most_bytes: int = 100_000) -> tuple[Rows, list[list[Extent]]]:
    """Rows of some tensors that have changed `depth` times, and storages over the newest rows. The seed chooses everything else."""
    random = np.random.default_rng(seed)
    rows, storages = Rows(), []
    for _ in range(int(random.integers(1, 4))):
        n_bytes = int(random.integers(1, most_bytes // 8 + 1)) * 8
        versions = _Tensor(rows, random, n_bytes)
        for save in range(depth + 1):
            versions.save(save)
        if random.random() < 0.6:
            storages += versions.cast(depth)
        if random.random() < 0.8 or not storages:
            storages += versions.storages()
    order = random.permutation(len(storages)).tolist()
    return rows, [storages[at] for at in order]


class _Tensor:
    """One tensor, in rows of one length; a later save may cut it otherwise, so that bases lie in two rows."""

    def __init__(self, rows: Rows, random: np.random.Generator, n_bytes: int) -> None:
        self._rows, self._random, self._n_bytes = rows, random, n_bytes
        self._raw = (random.standard_normal(n_bytes // 4 + 1) * 0.02).astype("<f4").view(np.uint8)[:n_bytes].copy()
        self._places: list[tuple[int, int]] = []
        """Rows, and where each begins in the tensor."""
        self._step = n_bytes

    def save(self, number: int) -> None:
        """Add rows for what the tensor is after one more change."""
        random, old = self._random, {at: row for row, at in self._places}
        if number:
            self._change()
        step = int(random.integers(1, self._n_bytes // 8 + 1)) * 8
        step = max(step, self._n_bytes // 8 // 6 * 8 or 8)  # not more than some seven rows
        if old and random.random() < 0.6:
            step = self._step
        self._step = step
        found = []
        for at in range(0, self._n_bytes, step):
            raw = self._raw[at : at + step]
            found.append((self._add(raw, at, old, number), at))
        self._places = found

    def _change(self) -> None:
        random = self._random
        lanes = self._raw.view("<u4")
        kind = random.random()
        if kind < 0.2:
            return
        chosen = random.random(lanes.size) < (0.05 if kind < 0.6 else 1.0)
        lanes[chosen] += random.integers(0, 5, int(chosen.sum())).astype("<u4")

    def _add(self, raw: U8, at: int, old: dict[int, int], pack: int) -> int:
        random, rows = self._random, self._rows
        about: dict[str, Any] = {
            "pack": pack,
            "ours": random.random() < 0.8,
            "gap": int(random.choice([0, 0, 0, 5, 300])),
        }
        base = self._base(raw, at, old)
        if base is not None and random.random() < 0.85:
            before = rows.base(base, raw.size, 4)
            if before is not None and np.array_equal(before, raw) and random.random() < 0.5:
                return rows.add(raw, Transform.REF, base, lane_bytes=4, **about)
            transform = Transform.SUB if random.random() < 0.4 else Transform.SUBPACK
            return rows.add(raw, transform, base, pack_bits=int(random.choice([1, 2, 4, 8])), **about)
        return rows.add(raw, Transform.ROT if random.random() < 0.8 else Transform.RAW, **about)

    def _base(self, raw: U8, at: int, old: dict[int, int]) -> tuple[int, int] | None:
        """Where the older bytes of a stretch are, if they are in one row or in two side by side."""
        starts = sorted(old)
        begins = [start for start in starts if start <= at]
        if not begins:
            return None
        start = begins[-1]
        reach = sum(self._rows.raws[row].size for row in range(old[start], min(old[start] + 2, len(self._rows.raws))))
        after = [one for one in starts if one > start][:1]
        if at + raw.size > (after[0] if after else self._n_bytes) and (not after or old[after[0]] != old[start] + 1):
            return None
        return (old[start], (at - start) // 4) if at - start + raw.size <= reach else None

    def storages(self) -> list[list[Extent]]:
        """Cut the tensor into some storages."""
        cuts = sorted(
            {
                0,
                self._n_bytes,
                *(int(at) for at in self._random.integers(0, self._n_bytes, int(self._random.integers(0, 3)))),
            }
        )
        return [self._extents(start, stop) for start, stop in itertools.pairwise(cuts)]

    def _extents(self, start: int, stop: int) -> list[Extent]:
        found = []
        for row, at in self._places:
            size = self._rows.raws[row].size
            first, last = max(start, at), min(stop, at + size)
            if first < last:
                found.append(Extent(row, first - at, last - first))
        return found

    def cast(self, pack: int) -> list[list[Extent]]:
        """Add a bfloat16 copy of the newest bytes, as a storage. Most rows are relative to the master's."""
        narrow = np.empty(self._n_bytes // 2, np.uint8)
        kernels().cast(self._raw, narrow)
        places = {at: row for row, at in self._places}
        step = self._step if self._random.random() < 0.7 else max(8, self._n_bytes // 3 // 8 * 8)
        extents = []
        for at in range(0, self._n_bytes, step):
            wide = self._raw[at : at + step]
            base = self._base(wide, at, places)
            raw = narrow[at // 2 : (at + step) // 2]
            if base is None:
                row = self._rows.add(raw, Transform.ROT, pack=pack, lane_bytes=2)
            else:
                row = self._rows.add(raw, Transform.CAST, base, lane_bytes=2)
            extents.append(Extent(row, 0, raw.size))
        return [extents]


class Counted(Wrapper):
    """Counts reads of packs."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.reads: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        with self._lock:
            self.reads.append((key, offset, memoryview(out).nbytes))
        super().get_into(key, offset, out)
