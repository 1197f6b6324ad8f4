"""Ranks that share what they hold alike, each against the checkpoint before: every rank's state comes back whole, bit for bit."""

from __future__ import annotations

import time
from typing import Any

import torch

from fastckpt.format.keys import SaveId
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.repository.commit import try_commit
from fastckpt.state.sealing import seal
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.bases import Base
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload
from tests.support.delta_runs import OPTIONS, Kept
from tests.support.repositories import begin, check_all, read, shared
from tests.support.states import same

N = 1_300_000
HALVES = {"w": ((0, 4 << 20), (1, 4 * N - (4 << 20))), "master": ((0, 4 << 20), (1, 4 * N - (4 << 20)))}
HALVES["copy"] = ((0, 2 << 20), (1, 2 * N - (2 << 20)))


def save(
    store: MemoryStore, step: int, states: list[Any], bases: list[Base | None], parent: Parent | None
) -> tuple[Commit, list[Base], list[int]]:
    """All ranks' parts, and the commit; then the bases of the next save, and what each rank has stored."""
    done = []
    for rank, obj in enumerate(states):
        sealed = seal(shared(obj, rank, HALVES))
        save_id = SaveId(1, step, 0)
        request = SaveRequest(asked=SaveAsked(step), save=save_id, parent=parent, rank=rank, world=len(states))
        done.append((sealed, upload(sealed, store, request, OPTIONS, base=bases[rank])))
    commit = try_commit(store, SaveId(1, step, 0))
    assert commit is not None
    now = Parent(commit.checkpoint, commit.digest)
    made: list[Base] = [found.as_base(sealed, now, Kept(sealed), time.monotonic()) for sealed, found in done]
    return commit, made, [found.vote.info.stored_bytes for _, found in done]


def test_shares_against_a_base() -> None:
    store, generator = MemoryStore(), torch.Generator().manual_seed(1)
    begin(store, 2)
    weights, master = torch.randn(N, generator=generator), torch.randn(N, generator=generator)
    frozen = torch.randn(400_000, generator=generator)
    bases: list[Base | None] = [None, None]
    parent, first = None, [0, 0]
    for step in (1, 2, 3):
        states = [{"w": weights, "master": master, "copy": master.bfloat16(), "own": frozen + r} for r in range(2)]
        commit, made, stored = save(store, step, states, bases, parent)
        bases, parent = [*made], made[0].parent
        for rank, obj in enumerate(states):
            assert same(read(store, commit, rank), obj)
        first = first if any(first) else stored
        assert step == 1 or all(now < 0.8 * then for now, then in zip(stored, first, strict=True))
        weights = weights * 1.000001
    check_all(store)
