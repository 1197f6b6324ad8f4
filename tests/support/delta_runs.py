"""Saves of a run without a Checkpointer, each against the one before it, whose bytes are kept as the test wants it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastckpt import Options
from fastckpt._types import U8
from fastckpt.format.records import transform_of
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.format.sealed_state import SealedState
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.writing.bases import Base, Uploaded
from tests.support.states import sealed

OPTIONS = Options(threads=2, connections=2, host_budget_bytes=256 << 20, effort="normal")


class Kept:
    """The bytes of a state's chunks."""

    def __init__(self, state: SealedState, keeps: Callable[[int], bool] = lambda _: True) -> None:
        scratch = np.empty(max((chunk.n_bytes for chunk in state.chunks), default=0), np.uint8)
        self.chunks = {n: state.source.raw(n, scratch).copy() for n in range(len(state.chunks)) if keeps(n)}
        self.lent = 0

    @contextlib.contextmanager
    def lend(self, chunk: int) -> Iterator[U8 | None]:
        self.lent += 1
        yield self.chunks.get(chunk)


class Run:
    """One incarnation, and the base of its next save."""

    def __init__(self, store: Store, options: Options = OPTIONS, *, keeps: Callable[[int], bool] | None = bool) -> None:
        """keeps: of which chunks the bytes are kept; None: of none."""
        self.job = Incarnation(Repository(store), options)
        self.job.choose_and_claim()
        self.keeps = (lambda _: True) if keeps is bool else keeps
        self.base: Base | None = None
        self.uploaded: Uploaded | None = None

    def save(self, step: int, obj: Any, *, full: bool = False) -> Commit:
        """One save; then it is the base of the next."""
        return self.save_sealed(step, obj if isinstance(obj, SealedState) else sealed(obj), full=full)

    def save_sealed(self, step: int, state: SealedState, *, full: bool = False) -> Commit:
        found: list[Uploaded] = []
        commit = self.job.save(state, step, base=None if full else self.base, uploaded=found.append)
        (self.uploaded,) = found
        memory = None if self.keeps is None else Kept(state, self.keeps)
        seen_s = self.base.seen_s if self.base is not None else 0.0
        self.base = self.uploaded.as_base(
            state, Parent(commit.checkpoint, commit.digest), memory, max(seen_s, time.monotonic())
        )
        return commit

    def transforms(self) -> list[str]:
        """Of all rows of the last save."""
        assert self.uploaded is not None
        return [transform_of(record) for record in self.uploaded.records]

    @property
    def stored_bytes(self) -> int:
        """What the last save has put into packs."""
        assert self.uploaded is not None
        return self.uploaded.vote.info.stored_bytes
