"""Prints of storages that ranks should hold alike: what a vote says of all bytes, so that ranks that hold different ones are found out."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fastckpt._types import U8
from fastckpt.format.digest import digest_of
from fastckpt.host.pages import fresh_pages
from fastckpt.state.capture import Captured

_STEP_BYTES = 4 << 20


def prints_of(captured: Captured, numbers: Collection[int]) -> dict[int, str]:
    """The digests of all bytes of some storages with data, by number, as 32 hex digits. What others write is read, too.

    Takes 4 MiB, and one reading of these storages: from a device, a copy to the host. Any thread, while nobody changes the state. SaveError
    for a storage that was resized since it was captured.
    """
    if not numbers:
        return {}
    scratch = fresh_pages(_STEP_BYTES)
    return {number: digest_of(_parts(captured, number, scratch)).hex() for number in numbers}


def _parts(captured: Captured, number: int, scratch: U8) -> Iterator[U8]:
    n_bytes = captured.storages[number].n_bytes
    for start in range(0, n_bytes, _STEP_BYTES):
        part = scratch[: min(_STEP_BYTES, n_bytes - start)]
        captured.read([(number, start, part.size)], part)
        yield part
