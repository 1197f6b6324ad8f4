"""A captured state becomes what an upload takes, and a failure of that is told to all ranks."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import pytest
import torch

from fastckpt.errors import SaveError
from fastckpt.ranks.board import MemoryBoard
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.world import World
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.joint_commit import JointTurn
from fastckpt.repository.repository import Repository
from fastckpt.state.chunks import LiveChunks, cuts_of
from fastckpt.state.sealing import seal
from fastckpt.store.memory import MemoryStore
from fastckpt.training import save_queue
from fastckpt.training.save_queue import CommitHandle, Job, SaveQueue
from fastckpt.writing.rank import SaveAsked, UploadThreads
from tests.support.repositories import OPTIONS, shared
from tests.support.states import captured, rich_state, small_state
from tests.support.training import SHORT_S


def test_sizes_are_those_of_the_captured_state() -> None:
    """With shares too, and a storage without data."""
    obj = {**rich_state(2), "meta": torch.empty(1000, device="meta")}
    for state in (captured(obj), shared(obj, 1, {"model.weight": [(0, 400_000), (1, 800_000)]})):
        sealed = seal(state)
        assert (sealed.n_bytes, sealed.own_bytes) == (state.n_bytes, state.own_bytes)
        assert [chunk.n_bytes for chunk in sealed.chunks] == [chunk.n_bytes for chunk in cuts_of(state).chunks]
        assert [storage.shares for storage in sealed.storages] == [
            state.shares.get(number, ()) for number in range(len(state.storages))
        ]


def test_what_is_entered_after_the_seal_is_not_in_it() -> None:
    state = captured(small_state(1.0))
    sealed = seal(state)
    state.prints[0], state.tensors[:] = "00", []
    assert sealed.storages[0].print == ""
    assert len(sealed.tensors) == 3


def test_chunks_are_read_from_the_state_itself_if_there_is_no_other_source() -> None:
    sealed = seal(captured({"t": torch.arange(8, dtype=torch.uint8)}))
    assert sealed.source.raw(0, np.empty(8, np.uint8)).tolist() == [*range(8)]
    sealed.source.release(0)
    sealed.source.confirm()


def test_a_state_that_cannot_be_sealed_is_abandoned_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload, which tells the others of errors of its own, has not begun then."""
    board = MemoryBoard()
    first, second = (Fate(World(rank, 2), board, "1.0") for rank in range(2))

    def no_memory(*_: object) -> NoReturn:
        raise MemoryError("for the rows")

    monkeypatch.setattr(save_queue, "seal", no_memory)
    state = captured(small_state(1.0))
    queue, handle = SaveQueue(Incarnation(Repository(MemoryStore()), OPTIONS), None, 0.0), CommitHandle(1)
    threads = UploadThreads.start(state.own_bytes, OPTIONS)
    assert queue.put(Job(SaveAsked(1), state, LiveChunks(state), handle, threads, JointTurn(second, 0)))
    with pytest.raises(SaveError, match="for the rows"):
        handle.wait(SHORT_S)
    assert first.abandoned() == "!rank 1: MemoryError: for the rows"
    assert queue.wait_idle(SHORT_S)
