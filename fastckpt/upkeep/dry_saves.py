"""Saves of which only the figures are wanted: made as all saves are, into a store that keeps nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from fastckpt._types import Progress
from fastckpt.errors import StoreError
from fastckpt.format.keys import SaveId
from fastckpt.format.repository_records import Parent
from fastckpt.format.sealed_state import SealedState
from fastckpt.options import Options
from fastckpt.state import Captured
from fastckpt.state.sealing import seal
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.upkeep.stored_as import StoredAs, of_rows
from fastckpt.upkeep.stored_base import KnownBytes
from fastckpt.writing.bases import Base, Uploaded
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload

_FIRST = SaveId(1, 1, 0)
_DIGEST = "0" * 32


class _Nowhere(Store):
    """Takes everything that is put, and has nothing."""

    url = "nowhere"

    def put(self, key: str, data: Any) -> None:
        """Does nothing."""

    def put_if_absent(self, key: str, data: Any) -> None:
        """Does nothing."""

    def get(self, key: str) -> bytes:
        self._refuse(key)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self._refuse(key)

    def head(self, key: str) -> ObjectInfo:
        self._refuse(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())

    def delete(self, key: str) -> None:
        """Does nothing."""

    def _refuse(self, key: str) -> NoReturn:
        raise StoreError(f"{key} was not kept: this store keeps nothing")


@dataclass
class RowOfSaves:
    """What saves in a row would store, each against the one before it."""

    stored_bytes: list[int] = field(default_factory=list)
    """Of each save after the first."""
    stored: list[StoredAs] = field(default_factory=list)
    """How each of them is stored."""


def for_dry_saves(options: Options | None) -> Options:
    """Options for saves on one encoding thread, whose effort follows no link. None: the defaults."""
    options = replace(options or Options(), threads=1, connections=1, max_connections=1)
    return replace(options, effort="normal") if options.effort == "auto" else options


def dry_upload(sealed: SealedState, base: Base | None, options: Options) -> Uploaded:
    """One save. Takes `encoder_bytes` and `pack_bytes` of the options."""
    parent = None if base is None else base.parent
    save = _FIRST if parent is None else SaveId(parent.checkpoint.epoch, parent.checkpoint.step + 1, 0)
    asked = SaveAsked(save.step, trigger="analyze")
    return upload(sealed, _Nowhere(), SaveRequest(asked=asked, save=save, parent=parent), options, base=base)


def dry_base(older: SealedState, options: Options) -> Base:
    """The base that a full save of a state would become. Its bytes are read from the state's source."""
    return _as_base(older, dry_upload(older, None, options))


def _as_base(state: SealedState, uploaded: Uploaded) -> Base:
    memory = KnownBytes(state.source, [chunk.n_bytes for chunk in state.chunks])
    return uploaded.as_base(state, Parent(uploaded.vote.name.save.checkpoint, _DIGEST), memory, 0.0)


def row_of_saves(
    newer: Captured,
    older: Captured,
    n: int,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> RowOfSaves:
    """Save the older state in full, and then the newer and the older one in turns: differences between them are alike both ways.

    So this tells what a run stores in the long run, when chains are as long as they may be, and some chunks are written in full again.
    n: how many saves after the first. progress: called with saves done and in all.
    """
    options = for_dry_saves(options)
    states = seal(older), seal(newer)
    found, base = RowOfSaves(), dry_base(states[0], options)
    for number in range(1, n + 1):
        state = states[number % 2]
        uploaded = dry_upload(state, base, options)
        vote = uploaded.vote
        found.stored_bytes.append(vote.info.stored_bytes)
        found.stored.append(of_rows(uploaded.records, _used(uploaded), vote.files, vote.name.save))
        base = _as_base(state, uploaded)
        progress(number, n)
    return found


def _used(uploaded: Uploaded) -> list[int]:
    ends = np.cumsum(uploaded.records["raw_bytes"], dtype=np.int64)
    storages = uploaded.vote.directory.storages
    return sorted({row for storage in storages for row in rows_of(storage.extents or (), ends)})


def rows_of(extents: Sequence[tuple[int, int, int]], ends: Any) -> list[int]:
    """The rows, or chunks, that extents run through. ends: of each, where its raw bytes end in the sum of all."""
    found: list[int] = []
    for row, offset, n_bytes in extents:
        start = (int(ends[row - 1]) if row else 0) + offset
        found += range(row, int(np.searchsorted(ends, start + n_bytes, "left")) + 1)
    return found


__all__ = ["RowOfSaves", "dry_base", "dry_upload", "for_dry_saves", "row_of_saves", "rows_of"]
