"""How long a fence keeps the training thread, and what its error says about the limit that ended it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastckpt.errors import SnapshotStalledError
from fastckpt.host.deadline import NEVER, Deadline
from fastckpt.snapshot import Snapshot, Stager
from fastckpt.state.chunks import cuts_of
from tests.support.states import captured

MIB = 1 << 20
LONG_S = 60.0


@contextlib.contextmanager
def stuck_ring(max_stall_s: float) -> Iterator[Snapshot]:
    """A ring that does not turn: nobody reads its chunks."""
    state = captured({"x": torch.zeros(16 * MIB, dtype=torch.uint8)})
    stager = Stager(12 * MIB, 1, "test", max_stall_s)
    snapshot = stager.begin(state, cuts_of(state), None, 7, ring=True)
    assert snapshot is not None
    yield snapshot
    snapshot.close()
    assert stager.pool.used_bytes == 0


@pytest.fixture
def stuck() -> Iterator[Snapshot]:
    with stuck_ring(LONG_S) as snapshot:
        yield snapshot


def _ended_by(snapshot: Snapshot, by: Deadline | float | None) -> str:
    snapshot.fence("test", by)
    assert isinstance(snapshot.error, SnapshotStalledError)
    return str(snapshot.error)


def test_the_deadline_that_ends_it_is_named(stuck: Snapshot) -> None:
    began_s = time.monotonic()
    said = _ended_by(stuck, Deadline.after(0.25, "the notice"))
    assert re.search(r"after the 0\.\d s that were left \(the notice\)", said)
    assert "the snapshot of step 7 was dropped" in said
    assert "max_stall_s" not in said
    assert time.monotonic() - began_s >= 0.25


@pytest.mark.parametrize("by", [None, NEVER, "the notice", LONG_S])
def test_max_stall_s_is_named_where_it_is_the_sooner_one(by: Deadline | float | str | None) -> None:
    with stuck_ring(0.05) as snapshot:
        by = (
            Deadline.after(LONG_S, by) if isinstance(by, str) else by
        )  # from here on, not from when tests were collected
        said = _ended_by(snapshot, by)
        assert "after max_stall_s = 0.05 s" in said
        assert "were left" not in said


def test_a_deadline_that_has_expired_waits_for_nothing_and_says_so(stuck: Snapshot) -> None:
    assert "after the 0.0 s that were left (the notice)" in _ended_by(stuck, Deadline(0.0, "the notice"))


def test_seconds_are_a_deadline_too(stuck: Snapshot) -> None:
    assert "after the 0.0 s that were left" in _ended_by(stuck, 0.0)


def test_a_ring_that_turns_needs_no_limit(stuck: Snapshot) -> None:
    scratch = np.empty(4 * MIB, np.uint8)
    for number in range(len(stuck.cuts.chunks)):
        assert not stuck.raw(number, scratch).any()
        stuck.release(number)
    stuck.fence("test", Deadline(0.0, "the notice"))
    assert stuck.error is None
    stuck.confirm()
