"""Parts of the format: what is built is what is parsed, for any names and numbers."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.errors import CorruptCheckpointError
from fastckpt.format import container, directory, directory_reader, records
from fastckpt.format.container import INDEX_PARTS, PartEntry
from fastckpt.format.directory import Directory, Extent, GlobalPlace, StorageEntry, TensorEntry
from fastckpt.format.tensor_names import ReprKey, canonical, from_json, key_of, to_json

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
PYTHON_KEYS = st.one_of(
    ANY_TEXT, st.integers(), st.booleans(), st.none(), st.floats(), st.binary(max_size=3), st.tuples(ANY_TEXT)
)
NAMES = st.lists(PYTHON_KEYS.map(key_of), max_size=4).map(tuple)


@given(value=PYTHON_KEYS)
def test_keys_are_typed(value: Any) -> None:
    key = key_of(value)
    plain = type(value) in (str, int)
    assert key == value if plain and not isinstance(key, ReprKey) else isinstance(key, ReprKey)
    str(key).encode()  # no surrogate is left


@given(names=st.lists(NAMES, max_size=12))
def test_canonical_order_is_total(names: list[Any]) -> None:
    ordered = sorted(names, key=canonical)
    backwards = names[::-1]
    assert sorted(backwards, key=canonical) == ordered
    for a, b in itertools.pairwise(ordered):
        assert (canonical(a) == canonical(b)) == (a == b)
    for name in names:
        assert from_json(to_json(name)) == name
        assert all(canonical(name[:n]) < canonical(name) for n in range(len(name)))


def test_canonical_order_of_the_text() -> None:
    keys: list[Any] = [-5, 2, 10, "", "10", "Z", "a", "é", "\U0001f600", ReprKey(""), ReprKey("True")]
    assert sorted([(key,) for key in keys[::-1]], key=canonical) == [(key,) for key in keys]


@st.composite
def directories(draw: st.DrawFn) -> Directory:
    storages, tensors = [], []
    for number in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            storages.append(StorageEntry("float32", 64, draw(st.text(max_size=4)) + "!", (Extent(number, 0, 64),)))
        else:
            storages.append(StorageEntry("int8", draw(st.integers(64, (1 << 63) - 1)), "meta", None))
    for _ in range(draw(st.integers(0, 6)) if storages else 0):
        shape = tuple(draw(st.lists(st.integers(0, 2), max_size=4)))
        stride = tuple(draw(st.integers(0, 1)) for _ in shape)
        tensors.append(
            TensorEntry(
                draw(NAMES),
                draw(st.sampled_from(["float32", "bfloat16", "bool"])),
                shape,
                stride,
                draw(st.integers(0, 8)),
                draw(st.integers(0, len(storages) - 1)),
                draw(st.sampled_from(sorted(directory.KINDS))),
                draw(st.booleans()),
                draw(st.none() | st.just(GlobalPlace((4, 4), (2, 0)))),
            )
        )
    tensors.sort(key=lambda entry: canonical(entry.name))
    any_json = st.recursive(
        st.none() | st.integers(-9, 9) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)
    )
    world = draw(st.integers(1, 9))
    meta = draw(st.dictionaries(st.text(max_size=3), any_json, max_size=3))
    step = draw(st.none() | st.integers(0, (1 << 63) - 1))
    rank = draw(st.integers(0, world - 1))
    return Directory(tuple(storages), tuple(tensors), step, rank, world, {"name": "x"}, meta)


@given(value=directories())
@settings(deadline=None)
def test_directory(value: Directory) -> None:
    built = directory.build(value)
    parsed = directory_reader.parse(built, np.full(8, 64, np.uint32), "here")
    assert parsed == value
    assert directory.build(parsed) == built
    written = json.dumps(json.loads(built), separators=(",", ":"), ensure_ascii=False).encode()
    assert written == built, "rows are put together as an encoder would"


@given(
    lengths=st.tuples(*[st.integers(0, 10_000)] * 4),
    payload=st.integers(0, 1 << 40),
    digests=st.tuples(*[st.binary(min_size=16, max_size=16)] * 4),
)
def test_footer(lengths: tuple[int, ...], payload: int, digests: tuple[bytes, ...]) -> None:
    position, entries = 64 + payload, []
    for i, (length, sum_) in enumerate(zip(lengths, digests, strict=True)):
        n = length * 64 if INDEX_PARTS[i] == "records" else length
        entries.append(PartEntry(position, n, sum_))
        position += n
    header = container.build_header()
    data = container.build_footer(entries, payload, header)
    footer = container.parse_footer(data, position + 256, "here")
    assert list(footer.parts.values()) == entries
    assert (footer.payload_bytes, footer.container_bytes, footer.header_bytes) == (payload, position + 256, header)
    with pytest.raises(CorruptCheckpointError, match="container length"):
        container.parse_footer(data, position + 255, "here")


@given(sizes=st.lists(st.tuples(st.integers(1, 1 << 22), st.booleans()), max_size=20))
def test_records(sizes: list[tuple[int, bool]]) -> None:
    rows = np.zeros(len(sizes), records.LAYOUT)
    position = 64
    for row, (size, constant) in zip(rows, sizes, strict=True):
        row["transform"], row["lane_bytes"], row["raw_bytes"] = (2 if constant else 1), 1, size
        if not constant:
            row["offset"], row["stored_bytes"] = position, size
            position += size
    back = records.unpack(rows.tobytes())
    assert back.tobytes() == rows.tobytes()
    assert records.check(back, position) == []
    assert records.check(back, position + 1) != []
