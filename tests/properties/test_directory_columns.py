"""Two ways to read a directory, one for what writers write and one with words for what is wrong: they accept the same and find the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastckpt.errors import CheckpointError
from fastckpt.format import directory, directory_columns, directory_reader
from fastckpt.format.directory import Directory, Extent, GlobalPlace, Share, StorageEntry, TensorEntry

RANK = 1
RAW_BYTES = np.full(6, 640, np.uint32)
SEEDS = range(40)


def some_directory(rng: random.Random, odd: bool) -> Directory:
    storages, tensors = [], []
    for _ in range(rng.randrange(1, 6)):
        record, offset = rng.randrange(6), 16 * rng.randrange(40)
        n_bytes = 16 * rng.randrange(1, 1 + (640 * (6 - record) - offset) // 16)
        storages.append(StorageEntry("float32", n_bytes, "cpu", (Extent(record, offset, n_bytes),)))
    shared = rng.random() < 0.5
    if shared:
        storages += some_shares(rng)
    if odd and rng.random() < 0.5:
        storages.append(StorageEntry("bool", 9, "meta", None))
        storages.append(StorageEntry("bool", 0, "cpu", ()))
    for number in range(rng.randrange(8)):
        storage = rng.randrange(len(storages))
        if storages[storage].shares:
            continue  # has its name below
        room = storages[storage].n_bytes // 4
        size = rng.randrange(1 + room) if room else 0
        name: tuple[Any, ...] = ("model", number, rng.choice(["weight", "bias:", "µ"]))
        kind = rng.choice(sorted(directory.KINDS))
        place = GlobalPlace((9,), (0,)) if odd and rng.random() < 0.2 else None
        offset = rng.randrange(1 + room - size)
        tensors.append(
            TensorEntry(name, "float32", (size, 1), (1, 5), offset, storage, kind, rng.random() < 0.5, place)
        )
    for number, entry in enumerate(storages):
        if entry.shares:
            tensors.append(TensorEntry(("shared", number), "float32", (1,), (1,), 0, number, "tensor", False))
    meta = {"a": [1, {"b": 0.5}], "note": rng.choice(["plain", '":', "\\", "\n", '"'])} if odd else {"epoch": 3}
    place = (RANK, 4) if shared else (0, 1)
    return Directory(tuple(storages), tuple(tensors), rng.choice([None, 7]), *place, {"name": "fastckpt"}, meta)


def some_shares(rng: random.Random) -> list[StorageEntry]:
    found = []
    for _ in range(rng.randrange(1, 4)):
        ranks = sorted(rng.sample(range(4), rng.randrange(1, 4)))
        shares = tuple(Share(rank, 16 * rng.randrange(1, 5)) for rank in ranks)
        own = sum(share.n_bytes for share in shares if share.rank == RANK)
        extents = (Extent(rng.randrange(6), 16, own),) if own else ()
        print_text = rng.choice(["", "0123456789abcdef" * 2])
        found.append(StorageEntry("float32", sum(s.n_bytes for s in shares), "cpu", extents, shares, print_text))
    return found


def duplicated(rng: random.Random, text: str) -> str:
    """A member twice in one object."""
    members = [
        '"bytes":1,', '"name":["x"],', '"shares":[[1,16]],', '"print":"",', '"offset":0,', '"step":7,', '"byteorder":"little",',
        '"storages":[],', '"a":1,"a":1,',
    ]  # fmt: skip
    return insert_after(rng, text, "{", rng.choice(members))


def insert_after(rng: random.Random, text: str, mark: str, inserted: str) -> str:
    places = [i + len(mark) for i in range(len(text)) if text.startswith(mark, i)]
    at = rng.choice(places) if places else 0
    return text[:at] + inserted + text[at:]


def replaced_number(rng: random.Random, text: str) -> str:
    import re

    places = list(re.finditer(r"(?<=[:,\[])-?\d+(?=[,\]}])", text))
    found = rng.choice(places)
    values = [
        "-1",
        "0",
        "1",
        "true",
        "null",
        "1.0",
        "1e3",
        "NaN",
        "Infinity",
        "01",
        '"1"',
        "[]",
        "{}",
        "-0",
        "99999999999999999999",
    ]
    values += [str(2**n + d) for n in (40, 60, 62, 63, 64) for d in (-1, 0, 1)] + [
        "1" * 18,
        "1" * 19,
        "1" * 20,
        "1" * 5000,
    ]
    return text[: found.start()] + rng.choice(values) + text[found.end() :]


def spaced(rng: random.Random, text: str) -> str:
    return insert_after(rng, duplicated(rng, text) if rng.random() < 0.5 else text, '"', " ")


def spaced_colon(rng: random.Random, text: str) -> str:
    return (duplicated(rng, text) if rng.random() < 0.5 else text).replace('":', '" :', rng.randrange(3))


def deep(rng: random.Random, text: str) -> str:
    n = rng.choice([5, 400, 100_000])
    return insert_after(
        rng, text, "{", f'"meta":{"[" * n}{"]" * n},' if rng.random() < 0.5 else f'"x":{"[" * n}{"]" * n},'
    )


def escaped(rng: random.Random, text: str) -> str:
    return insert_after(rng, text, '"', rng.choice(["\\ud800", "\\u0061", "\\n", "\x00", "\ud800", "é", ":"]))


def member_gone(rng: random.Random, text: str) -> str:
    value = json.loads(text)
    row = rng.choice([value, *value["storages"], *value["tensors"]])
    if rng.random() < 0.5:
        del row[rng.choice(list(row))]
    else:
        row[rng.choice([*row, "new"])] = rng.choice(
            [None, 1, "x", "float64", "tensor", [], {}, True, {"a": 1}, [[1, 2, 3]]]
        )
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def cut(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return text[:at] + text[at + rng.randrange(1, 3) :]


CHANGES = [duplicated, replaced_number, spaced, spaced_colon, deep, escaped, member_gone, cut]


def outcome(data: bytes) -> str:
    try:
        return repr(directory_reader.parse(data, RAW_BYTES, "x"))
    except CheckpointError as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_both_ways_accept_the_same(
    change: Callable[[random.Random, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = []
    for seed in SEEDS:
        rng = random.Random(seed)
        text = directory.build(some_directory(rng, odd=seed % 2 == 1)).decode()
        for _ in range(12):
            changed = change(rng, text)
            cases.append(changed.encode("utf-8", "surrogatepass"))
            if rng.random() < 0.3:
                cases.append(
                    change(rng, changed).encode("utf-8", "surrogatepass") if change is not member_gone else b"{}"
                )
    found = [outcome(case) for case in cases]
    monkeypatch.setattr(directory_columns, "parse", lambda *_: None)
    for case, before in zip(cases, found, strict=True):
        assert outcome(case) == before, case[:2000]


def test_what_writers_write_is_read_by_column() -> None:
    for seed in SEEDS:
        value = some_directory(random.Random(seed), odd=False)
        assert directory_columns.parse(directory.build(value), RAW_BYTES) is not None
        assert directory_reader.parse(directory.build(value), RAW_BYTES, "x") == value


def test_a_member_that_comes_twice_is_seen_wherever_it_is() -> None:
    text = directory.build(some_directory(random.Random(3), odd=False)).decode()
    for at in (i + 1 for i in range(len(text)) if text[i] == "{"):
        end = text.index(":", at)
        doubled = f"{text[:at]}{text[at:end]}:null,{text[at:]}"
        assert directory_columns.parse(doubled.encode(), RAW_BYTES) is None
        with pytest.raises(CheckpointError, match="a member occurs twice"):
            directory_reader.parse(doubled.encode(), RAW_BYTES, "x")
