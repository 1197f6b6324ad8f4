"""Votes with shares, made by a stranger who computes every digest right: refused, or merged to what is made of bytes that exist."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from fastckpt.errors import CheckpointError
from fastckpt.format import container, records
from fastckpt.format.directory import FileEntry
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.contents import OfContainer
from fastckpt.reading.merged_reader import merge
from fastckpt.reading.object_source import BytesSource
from fastckpt.reading.sources import PathSource, Source
from fastckpt.reading.tensor_reader import TensorReader
from fastckpt.writing.container import index_and_footer
from tests.faults.test_hostile import mutate_json
from tests.faults.tools import seeded
from tests.golden import make_shares

CASES = 150  # of each kind
SLOWEST_S = 5.0
OPTIONS = Options(threads=1, max_load_bytes=64 << 20)
FOLDER = make_shares.ROOT / "must_read"


def broken(rng: random.Random, data: bytes, kind: str) -> bytes:
    """A vote with something else in its directory or records, and right digests."""
    footer = container.parse_footer(data[-container.FOOTER_BYTES :], len(data), "good")
    parts = {name: data[p.offset : p.offset + p.n_bytes] for name, p in footer.parts.items()}
    if kind == "records" and parts["records"]:
        rows = np.frombuffer(parts["records"], records.LAYOUT).copy()
        field = rng.choice(["transform", "file", "offset", "raw_bytes", "stored_bytes", "parameter"])
        if field == "parameter":
            rows[field][-1] = np.void(struct.pack("<II", rng.randrange(4), rng.choice([0, 1, 60, 1 << 31])))
        else:
            rows[field][rng.randrange(len(rows))] = rng.choice([0, 1, 2, 3, 8, 64, 255])
        parts["records"] = rows.tobytes()
    else:
        value = json.loads(parts["directory"])
        storages = [storage for storage in value["storages"] if "shares" in storage]
        storage = rng.choice(storages)
        if rng.random() < 0.6:
            member = rng.choice(["shares", "shares", "extents", "bytes", "print", "location"])
            storage[member] = mutate_json(rng, storage.get(member, []))
        elif rng.random() < 0.5:
            value[rng.choice(["rank", "world"])] = rng.choice([0, 1, 2, 5, 1 << 40, (1 << 63) - 1, -1, True, None])
        else:
            value = mutate_json(rng, value)
        parts["directory"] = json.dumps(value).encode()
    header = data[: container.HEADER_BYTES]
    return b"".join([header, *index_and_footer(header, 0, list(parts.values()))])


def merged(folder: Path, votes: dict[int, bytes], rank: int) -> None:
    """Open, merge and fetch all tensors of a rank."""

    def pack(file: FileEntry) -> Source:
        return PathSource(str(folder / file.key)) if (folder / file.key).exists() else BytesSource(b"", file.key)

    opened = {number: Reader.open_vote(BytesSource(data, f"r{number}"), pack) for number, data in votes.items()}
    reader = merge(opened[rank], opened)
    for number, storage in enumerate(reader.directory.storages):
        at = 0
        for piece in reader.pieces(number):
            assert piece.position == at
            at += piece.n_bytes
        assert at == (0 if storage.extents is None else storage.n_bytes), "memory that nothing was read into"
    with TensorReader(OfContainer(reader, OPTIONS)) as found:
        for entry in reader.directory.tensors:
            found[entry.name]


@pytest.mark.parametrize("kind", ["directory", "records"])
def test_they_are_refused_or_made_of_bytes_that_exist(kind: str) -> None:
    rng = seeded(f"shares {kind}")
    n_refused = 0
    for _ in range(CASES):
        folder = FOLDER / rng.choice(["two_ranks", "bases", "constant_and_bundle", "four_ranks"])
        votes = {int(path.stem[1:]): path.read_bytes() for path in folder.glob("*.vote")}
        victim = rng.choice(list(votes))
        votes[victim] = broken(rng, votes[victim], kind)
        began_s = time.monotonic()
        try:
            merged(folder, votes, 0)
        except CheckpointError:
            n_refused += 1
        assert time.monotonic() - began_s < SLOWEST_S
    assert n_refused > CASES // 3
