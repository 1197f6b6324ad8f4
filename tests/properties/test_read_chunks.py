"""Chunks that the native kernels read, verify and decode in one call: the bytes that were encoded, or a status that is not 0."""

from __future__ import annotations

import ctypes
import os
import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.codec.choose import Coding, Effort
from fastckpt.format import records
from fastckpt.kernels import kernels
from fastckpt.kernels.checksums import digest
from fastckpt.kernels.chunk_table import CHUNK, DAMAGED, FOREIGN, NO_BASE, OK, OUTCOME, can_be_read, table_of
from fastckpt.kernels.transform import Transform

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


# -- bases ----------------------------------------------------------------------------------------------------------------


class Chain:
    """A key and deltas of it, each of the one before: their rows, stored bytes and raw bytes."""

    def __init__(self, n_bytes: int, steps: list[str], seed: int) -> None:
        random = np.random.default_rng(seed)
        raws = [raw_of("weights", n_bytes, seed)]
        for step in steps:
            raw = raws[-1].copy()
            lanes = raw[: n_bytes // 4 * 4].view("<u4")
            if step == "sparse":  # its own bytes at the front stay, and zstd finds matches
                lanes[-(lanes.size // 20 + 1) :] += random.integers(0, 3, lanes.size // 20 + 1).astype("<u4")
            elif step != "same":
                lanes += random.integers(0, 9, lanes.size).astype("<u4")
            raws.append(raw)
        self.raws, self.stored = raws, b""
        self.rows = np.zeros(len(raws), records.LAYOUT)
        for number, (row, raw) in enumerate(zip(self.rows, raws, strict=True)):
            step = steps[number - 1] if number else ""
            if not number:
                one = codec.encode(raw, 4, 4)
            elif step == "same":
                one = codec.Encoded(Transform.REF, 4, 0, bytes(8), b"", digest(raw), 0)
            else:
                coding = Coding(
                    Transform.SUBPACK if step == "packed" else Transform.SUB,
                    4 if step == "packed" else 0,
                    1 if step in ("sparse", "foreign") else None,
                )
                found = codec.encode_as(coding, raw, raws[number - 1], 4, np.empty(3 * n_bytes, np.uint8))
                assert found is not None
                one = found
            row["transform"], row["lane_bytes"], row["pack_bits"] = one.transform, one.lane_bytes, one.pack_bits
            row["parameter"], row["digest"] = np.void(one.parameter), np.void(one.digest)
            row["crc64nvme"], row["raw_bytes"] = one.crc64nvme, raw.size
            row["offset"], row["stored_bytes"] = len(self.stored), len(one.stored)
            self.stored += bytes(one.stored)


def read_in_place(chain: Chain, table: Any) -> list[int]:
    """As a reader does: libzstd decodes what is FOREIGN, in its place, and another call reads the rest. The last statuses."""
    call = kernels().read_chunks
    assert call is not None
    outcomes, first = np.zeros(len(table), OUTCOME), 0
    while first < len(table):
        call(-1, chain.stored, table[first:], outcomes[first:])
        wrong = np.flatnonzero(outcomes["status"][first:])
        if not wrong.size or outcomes["status"][first + wrong[0]] != FOREIGN:
            break
        at = first + int(wrong[0])
        assert set(outcomes["status"][at + 1 :].tolist()) <= {NO_BASE}
        row, memory = chain.rows[at], memory_at(int(table["raw"][at]), int(table["raw_bytes"][at]))
        assert np.array_equal(memory, chain.raws[at - 1]), "the base is gone"
        frame = chain.stored[int(row["offset"]) : int(row["offset"]) + int(row["stored_bytes"])]
        found = codec.decode(Transform(row["transform"]), 4, int(row["pack_bits"]), bytes(8), frame, memory, memory)
        assert found == row["digest"].tobytes()
        outcomes["status"][at], first = OK, at + 1
    return outcomes["status"].tolist()


def memory_at(address: int, n_bytes: int) -> U8:
    return np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)


@given(
    steps=st.lists(st.sampled_from(["dense", "packed", "same", "sparse", "foreign"]), min_size=1, max_size=4),
    n_bytes=st.sampled_from([244, 256, 1000, 4096, 100_000, 524_288, 700_004, 1_100_000]),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_a_chain_is_decoded_in_one_place(steps: list[str], n_bytes: int, seed: int) -> None:
    chain = Chain(n_bytes, steps, seed)
    room = np.full(n_bytes + 2, 170, np.uint8)
    address = room.__array_interface__["data"][0] + 1
    last = np.arange(len(chain.rows)) == len(chain.rows) - 1
    assert can_be_read(chain.rows).all()
    table = table_of(chain.rows, chain.rows["offset"], address, False, address, ~last)
    assert read_in_place(chain, table) == [OK] * len(table)
    assert np.array_equal(room[1:-1], chain.raws[-1])
    assert room[0] == room[-1] == 170
    table["digest"][-1] = np.void(bytes(16))
    table["digest"][:-1] = np.void(bytes(16))
    assert read_in_place(chain, table[:1]) == [OK if len(table) > 1 else DAMAGED], "of a base the crc is enough"


@given(step=st.sampled_from(["dense", "packed", "same"]), at=st.sampled_from([0, 1]), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=40)
def test_a_damaged_base_is_no_base(step: str, at: int, bit: int) -> None:
    chain = Chain(4096, [step, "dense"], 1)
    if not chain.rows["stored_bytes"][at]:
        return
    stored = bytearray(chain.stored)
    stored[int(chain.rows["offset"][at]) + 20] ^= 1 << bit
    room = np.zeros(4096, np.uint8)
    address = room.__array_interface__["data"][0]
    table = table_of(chain.rows, chain.rows["offset"], address, False, address, [True, True, False])
    outcomes = np.zeros(3, OUTCOME)
    call = kernels().read_chunks
    assert call is not None
    call(-1, bytes(stored), table, outcomes)
    assert outcomes["status"].tolist() == [OK] * at + [DAMAGED] + [NO_BASE] * (2 - at)


def test_casts_are_read() -> None:
    for lanes in (121, 1000, 300_001):
        wide = raw_of("weights", 4 * lanes, 3)
        narrow = np.empty(2 * lanes, np.uint8)
        kernels().cast(wide, narrow)
        row = np.zeros(1, records.LAYOUT)
        row["transform"], row["lane_bytes"], row["raw_bytes"] = Transform.CAST, 2, narrow.size
        row["digest"] = np.void(digest(narrow))
        room, outcomes = np.zeros(narrow.size, np.uint8), np.zeros(1, OUTCOME)
        to, base = (array.__array_interface__["data"][0] for array in (room, wide))
        call = kernels().read_chunks
        assert call is not None
        call(-1, b"", table_of(row, 0, to, False, base), outcomes)
        assert outcomes["status"][0] == OK
        assert np.array_equal(room, narrow)
        for bad in (0, to, to - wide.size + 1, to + narrow.size - 1, (1 << 64) - wide.size):
            call(-1, b"", table_of(row, 0, to, False, bad), outcomes)
            assert outcomes["status"][0] not in (OK, FOREIGN)


@given(st.binary(min_size=CHUNK.itemsize, max_size=CHUNK.itemsize), st.binary(max_size=300), st.booleans(), st.data())
def test_survives_any_row(row: bytes, stored: bytes, from_file: bool, data: st.DataObject) -> None:
    """Everything but the room and the base's, which are the caller's word."""
    room = np.zeros(1 << 12, np.uint8)
    table = np.frombuffer(bytearray(row), table_of(np.zeros(0, records.LAYOUT), 0, 0, 0).dtype)
    table["raw"] = room.__array_interface__["data"][0]
    table["raw_bytes"] %= room.size + 1
    under = np.zeros(2 << 12, np.uint8)
    table["base"] = data.draw(
        st.sampled_from([0, int(table["raw"][0]), under.__array_interface__["data"][0], (1 << 64) - 1])
    )
    if data.draw(st.booleans()):
        table["transform"] = data.draw(
            st.sampled_from([Transform.SUB, Transform.SUBPACK, Transform.CAST, Transform.REF])
        )
        table["lane_bytes"] = data.draw(st.sampled_from([1, 2, 4, 8]))
        table["is_base"] = 0
    outcomes = np.zeros(1, OUTCOME)
    call = kernels().read_chunks
    assert call is not None
    with tempfile.TemporaryFile() as file:
        call(file.fileno() if from_file else -1, None if from_file else stored, table, outcomes)
    assert outcomes["status"][0] != 0 or table["is_base"][0]


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
