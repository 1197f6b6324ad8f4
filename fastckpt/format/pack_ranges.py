"""The packs that a tombstone says its checkpoint named: runs of numbers by folder, in few bytes (docs/format.md, section 11.1)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fastckpt.format.keys import DATA, parse_pack

PackRanges = Mapping[str, tuple[tuple[int, int], ...]]
"""Folder below `data/` → the first and the last number of each run of packs."""

_FOLDER = re.compile(r"\d{6}-\d{12}-\d{3}/r\d{5}")
_MOST = 10**6 - 1


def ranges_of(packs: Iterable[str]) -> PackRanges:
    """Keys of packs in few bytes. Keys of another form are left out: nothing deletes them."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for key in packs:
        if parse_pack(key) is not None:
            folder, number = split_key(key)
            numbers[folder].append(number)
    return {folder: _runs(sorted(set(found))) for folder, found in sorted(numbers.items())}


def _runs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return tuple(found)


def split_key(key: str) -> tuple[str, int]:
    """Folder below `data/` and number of a pack, from its key."""
    folder, _, name = key.removeprefix(DATA).rpartition("/")
    return folder, int(name.removesuffix(".pack"))


def ranges_to_json(ranges: PackRanges) -> dict[str, Any]:
    return {folder: [list(run) for run in runs] for folder, runs in ranges.items()}


def ranges_of_json(value: Mapping[str, Any]) -> PackRanges | None:
    """None for a value of another form."""
    found = {}
    for folder, runs in value.items():
        if not _FOLDER.fullmatch(folder) or not isinstance(runs, list) or not all(map(_is_run, runs)):
            return None
        found[folder] = tuple((first, last) for first, last in runs)
    return found


def _is_run(run: object) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 2
        and all(type(number) is int for number in run)
        and 0 <= run[0] <= run[1] <= _MOST
    )
