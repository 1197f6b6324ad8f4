"""A snapshot of a state that is shared with other ranks: what they write is neither copied nor budgeted nor watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import events
from fastckpt.errors import TornSnapshotError
from fastckpt.format.directory import Share
from fastckpt.snapshot import Stager
from fastckpt.snapshot.copy_plan import DoesNotFit
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.sampled import Sampler
from fastckpt.state import Captured
from fastckpt.state.chunks import KnownCuts, cuts_of
from tests.support.repositories import shared

MIB = 1 << 20


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(8 * MIB // 4, generator=generator) for name in ("mine", "ours", "theirs")}


SHARES = {"ours": [(0, 4 * MIB), (1, 4 * MIB)], "theirs": [(1, 8 * MIB)]}


def stager(budget_mib: int, verify: str = "off") -> Stager:
    return Stager(budget_mib * MIB, 1, "test", 60.0, verify)


def test_only_own_bytes_take_memory_and_are_counted() -> None:
    captured = shared(state(), 0, SHARES)
    seen: list[events.Event] = []
    assert (captured.n_bytes, captured.own_bytes) == (24 * MIB, 12 * MIB)
    cuts = cuts_of(captured)
    with pytest.raises(DoesNotFit):
        stager(16).begin(shared(state(), 0, {}), cuts_of(shared(state(), 0, {})), None, 1, ring=False)
    with events.subscribe(seen.append):
        one = stager(16)
        snapshot = one.begin(captured, cuts, None, 1, ring=False)
        assert snapshot is not None
        snapshot.fence()
        assert one.pool.used_bytes == 12 * MIB
        contents = [snapshot.raw(n, np.empty(4 * MIB, np.uint8)) for n in range(len(cuts.chunks))]
        expected = state()
        whole = {name: tensor.numpy().view(np.uint8) for name, tensor in expected.items()}
        parts = [whole["mine"][: 4 * MIB], whole["mine"][4 * MIB :], whole["ours"][: 4 * MIB]]
        assert len(contents) == 3
        assert all((a == b).all() for a, b in zip(contents, parts, strict=True))
        snapshot.confirm()
        assert not captured.owners, "let go of when all that is copied is there"
        snapshot.close()
    told = [
        (type(e).__name__, e.raw_bytes) for e in seen if isinstance(e, (events.SnapshotStarted, events.SnapshotStaged))
    ]
    assert told == [("SnapshotStarted", 12 * MIB), ("SnapshotStaged", 12 * MIB)]


def test_a_rank_that_writes_nothing_has_a_snapshot_of_nothing() -> None:
    captured = shared(state(), 2, {name: [(1, 8 * MIB)] for name in state()})
    assert captured.own_bytes == 0
    one = stager(16)
    snapshot = one.begin(captured, cuts_of(captured), None, 1, ring=False)
    assert snapshot is not None
    snapshot.fence()
    snapshot.confirm()
    assert one.pool.used_bytes == 0
    snapshot.close()


@pytest.mark.parametrize(("name", "torn"), [("mine", True), ("ours", True), ("theirs", False)])
def test_what_others_write_may_change(name: str, torn: bool) -> None:
    parameters = {key: torch.nn.Parameter(value) for key, value in state().items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    captured = shared(parameters, 0, SHARES)
    one = stager(64)
    snapshot = one.begin(captured, cuts_of(captured), FencedTensors([optimizer]), 1, ring=False)
    assert snapshot is not None
    with torch.no_grad():
        parameters[name].add_(1)
    snapshot.fence()
    assert isinstance(snapshot.error, TornSnapshotError) == torn
    snapshot.close()


def with_shares(found: Captured, n_bytes: int) -> Captured:
    (number,) = (n for n, entry in enumerate(found.tensors) if entry.name == ("ours",))
    found.shares = {found.tensors[number].storage: (Share(0, n_bytes), Share(1, 8 * MIB - n_bytes))}
    return found


def test_only_own_bytes_are_looked_at() -> None:
    objects = state()
    captured = shared(objects, 0, SHARES)
    sampler, cuts = Sampler(), cuts_of(captured)
    before = sampler.take(captured, cuts, 1).digests
    objects["theirs"].add_(1)
    objects["ours"][MIB:].add_(1)
    assert sampler.take(captured, cuts, 1).digests == before
    objects["ours"][:MIB].add_(1)
    assert sampler.take(captured, cuts, 1).digests != before


def test_cuts_and_samples_follow_the_shares_of_a_form() -> None:
    captured, known, sampler = shared(state(), 0, {}), KnownCuts(), Sampler()
    one = known.of(captured)
    assert known.of(captured) is one
    n_looked_at = len(sampler.take(captured, one, 1).digests)
    with_shares(captured, 4 * MIB)
    two = known.of(captured)
    assert len(two.chunks) == len(one.chunks) - 1
    assert known.of(with_shares(captured, 4 * MIB)) is two
    assert len(sampler.take(captured, two, 1).digests) == n_looked_at - 1
    captured.rank = 2
    assert len(known.of(captured).chunks) == len(one.chunks) - 2
