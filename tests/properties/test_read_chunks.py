"""Chunks that the native kernels read, verify and decode in one call: the bytes that were encoded, or a status that is not 0."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.codec.choose import Effort
from fastckpt.format import records
from fastckpt.kernels import kernels
from fastckpt.kernels.chunk_table import OUTCOME, can_be_read, table_of

pytestmark = pytest.mark.skipif(kernels().read_chunks is None, reason="only native kernels read chunks together")
_SIZES = (241, 256, 1000, 4096, 100_000, 524_288, 700_004)


def raw_of(kind: str, n_bytes: int, seed: int) -> U8:
    random = np.random.default_rng(seed)
    if kind == "weights":
        return np.resize((random.standard_normal(n_bytes // 4 + 1) * 0.02).astype("<f4").view(np.uint8), n_bytes)
    if kind == "squares":
        return np.resize((random.standard_normal(n_bytes // 4 + 1) ** 2).astype("<f4").view(np.uint8), n_bytes)
    if kind == "constant":
        return np.full(n_bytes, 7, np.uint8)
    return random.integers(0, 256, n_bytes, np.uint8)


def encoded(raws: list[U8]) -> tuple[Any, bytes]:
    """Records of some chunks, and their stored bytes one after another."""
    found = np.zeros(len(raws), records.LAYOUT)
    stored = b""
    for row, raw in zip(found, raws, strict=True):
        lane_bytes = 4 if raw.size % 4 == 0 else 1
        one = codec.encode(raw, lane_bytes, 4 if lane_bytes == 4 else 0, effort=Effort.NORMAL)
        row["transform"], row["lane_bytes"], row["pack_bits"] = one.transform, one.lane_bytes, one.pack_bits
        row["parameter"], row["digest"] = np.void(one.parameter), np.void(one.digest)
        row["crc64nvme"], row["raw_bytes"] = one.crc64nvme, raw.size
        row["offset"], row["stored_bytes"] = len(stored), len(one.stored)
        stored += bytes(one.stored)
    return found, stored


def read(chunks: Any, stored: bytes, *, from_file: bool, fresh: bool = False) -> tuple[list[int], list[U8]]:
    """Statuses, and what lies in the rooms then."""
    rooms = [np.full(int(n) + 2, 170, np.uint8) for n in chunks["raw_bytes"]]
    addresses = [room.__array_interface__["data"][0] + 1 for room in rooms]
    outcomes = np.zeros(len(chunks), OUTCOME)
    table = table_of(chunks, chunks["offset"], addresses, fresh)
    call = kernels().read_chunks
    assert call is not None
    if from_file:
        with tempfile.TemporaryFile() as file:
            file.write(stored)
            file.flush()
            call(file.fileno(), None, table, outcomes)
    else:
        call(-1, stored, table, outcomes)
    assert all(room[0] == room[-1] == 170 for room in rooms), "something was written beside its room"
    return outcomes["status"].tolist(), [room[1:-1] for room in rooms]


@st.composite
def some_chunks(draw: st.DrawFn) -> list[U8]:
    kinds = st.sampled_from(["weights", "squares", "constant", "noise"])
    n = draw(st.integers(1, 4))
    return [raw_of(draw(kinds), draw(st.sampled_from(_SIZES)), draw(st.integers(0, 9))) for _ in range(n)]


@given(some_chunks(), st.booleans(), st.booleans())
def test_gives_what_was_encoded(raws: list[U8], from_file: bool, fresh: bool) -> None:
    chunks, stored = encoded(raws)
    assert can_be_read(chunks).all()
    statuses, found = read(chunks, stored, from_file=from_file, fresh=fresh)
    assert statuses == [0] * len(raws)
    assert all(np.array_equal(one, raw) for one, raw in zip(found, raws, strict=True))


@given(some_chunks(), st.booleans(), st.data())
def test_never_calls_other_bytes_right(raws: list[U8], from_file: bool, data: st.DataObject) -> None:
    """One bit of the stored bytes or of a record is another, or the end is missing: the others are read all the same."""
    chunks, stored = encoded(raws)
    which = data.draw(st.sampled_from(["stored", "digest", "crc64nvme", "parameter", "end", "offset"]))
    at = data.draw(st.integers(0, len(chunks) - 1))
    row = chunks[at]
    harmless = which in ("stored", "crc64nvme", "end", "offset") and not row["stored_bytes"]
    if which == "parameter":
        harmless = row["transform"] != 2
    if which == "stored" and row["stored_bytes"]:
        changed = bytearray(stored)
        changed[int(row["offset"]) + data.draw(st.integers(0, int(row["stored_bytes"]) - 1))] ^= 1
        stored = bytes(changed)
    elif which == "end" and row["stored_bytes"]:
        stored = stored[: int(row["offset"]) + int(row["stored_bytes"]) - 1]
    elif which == "offset" and row["stored_bytes"]:
        row["offset"] = data.draw(st.sampled_from([len(stored), 1 << 62, (1 << 64) - 1, int(row["offset"]) + 1]))
    elif which in ("digest", "parameter"):
        changed = bytearray(row[which].tobytes())
        changed[0] ^= 1
        row[which] = np.void(bytes(changed))
    elif which == "crc64nvme":
        row[which] ^= np.uint64(1)
    statuses, found = read(chunks, stored, from_file=from_file)
    assert (statuses[at] == 0) is bool(harmless)
    for status, one, raw in zip(statuses, found, raws, strict=True):
        assert status or np.array_equal(one, raw)
    before = [status for number, status in enumerate(statuses) if number < at]
    assert before == [0] * at, "a chunk beside a damaged one was not read"


@given(st.binary(min_size=72, max_size=72), st.binary(max_size=300), st.booleans())
def test_survives_any_row(row: bytes, stored: bytes, from_file: bool) -> None:
    """Everything but the room, which is the caller's word."""
    room = np.zeros(1 << 12, np.uint8)
    table = np.frombuffer(bytearray(row), table_of(np.zeros(0, records.LAYOUT), 0, 0, 0).dtype)
    table["raw"] = room.__array_interface__["data"][0]
    table["raw_bytes"] %= room.size + 1
    outcomes = np.zeros(1, OUTCOME)
    call = kernels().read_chunks
    assert call is not None
    with tempfile.TemporaryFile() as file:
        call(file.fileno() if from_file else -1, None if from_file else stored, table, outcomes)
    assert outcomes["status"][0] != 0


def test_refuses_other_arguments() -> None:
    call = kernels().read_chunks
    assert call is not None
    chunks, outcomes = table_of(np.zeros(2, records.LAYOUT), 0, 0, 0), np.zeros(2, OUTCOME)
    for file, memory, rows, found in (
        (-1, None, chunks, outcomes),
        (0, b"", chunks, outcomes),
        (-1, b"", chunks[:1], outcomes),
        (-1, b"", chunks.view(np.uint8)[:-1], outcomes),
    ):
        with pytest.raises(ValueError, match=r"expected|are not"):
            call(file, memory, rows, found)
    call(-1, b"", chunks[:0], outcomes[:0])
    with open(os.devnull, "rb") as closed:
        number = closed.fileno()
    call(number, None, *(lambda rows: (rows, np.zeros(1, OUTCOME)))(chunks[:1]))
