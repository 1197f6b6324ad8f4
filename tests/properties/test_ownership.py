"""Who writes what of replicated bytes: everything once, evenly, and every member of a group decides the same."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.ranks.ownership import BYTES_PER_OWNER, MAX_OWNERS, Replicated, owners_of, share_out

MIB = 1 << 20
GROUPS = [(0, 2), (1, 3), (0, 1, 2, 3), (0, 1), (2, 3), tuple(range(8)), tuple(range(0, 300, 2)), (5,)]


@st.composite
def replicated(draw: st.DrawFn) -> list[Replicated]:
    sizes = st.one_of(st.integers(0, 5000), st.integers(1, 40 * MIB), st.sampled_from([4 * MIB, 8 * MIB, 8 * MIB - 4]))
    return [
        Replicated(
            key=((1, 0, f"w{number}"),),
            n_bytes=draw(sizes),
            chunk_bytes=draw(st.sampled_from([MIB, 2 * MIB, 4 * MIB])),
            group=draw(st.sampled_from(GROUPS)),
            only_first=draw(st.integers(0, 5)) == 0,
            first_byte=draw(st.sampled_from([0, 0, 3 * MIB, 12])),
        )
        for number in range(draw(st.integers(0, 20)))
    ]


@given(storages=replicated())
@settings(deadline=None, max_examples=150)
def test_every_byte_has_one_owner_in_its_group(storages: list[Replicated]) -> None:
    for storage, shares in zip(storages, share_out(storages), strict=True):
        if len(storage.group) == 1 or not storage.n_bytes:
            assert shares == ()
            continue
        assert sum(share.n_bytes for share in shares) == storage.n_bytes
        assert all(share.n_bytes >= 1 for share in shares)
        ranks = [share.rank for share in shares]
        assert ranks == sorted(set(ranks))
        assert set(ranks) <= set(storage.group)
        if storage.only_first:
            assert ranks == [storage.group[0]]
        if storage.n_bytes < 2 * storage.chunk_bytes:
            assert len(shares) == 1
        at = 0
        for share in shares[:-1]:
            at += share.n_bytes
            assert (storage.first_byte + at) % storage.chunk_bytes == 0


@given(storages=replicated(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_every_member_decides_the_same_from_what_it_holds(storages: list[Replicated], seed: int) -> None:
    decided = dict(zip((s.key for s in storages), share_out(storages), strict=True))
    for rank in {rank for storage in storages for rank in storage.group if rank < 8}:
        mine = [storage for storage in storages if rank in storage.group]
        random.Random(seed + rank).shuffle(mine)
        for storage, shares in zip(mine, share_out(mine), strict=True):
            assert decided[storage.key] == shares


@given(storages=replicated())
@settings(deadline=None, max_examples=150)
def test_shares_are_equal_within_a_chunk_at_either_end(storages: list[Replicated]) -> None:
    of_group: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for storage, shares in zip(storages, share_out(storages), strict=True):
        if not storage.only_first:
            for share in shares:
                of_group[storage.group][share.rank] += share.n_bytes
    for group, written in of_group.items():
        total = sum(written.values())
        owners = owners_of(group, total)
        assert len(owners) <= max(1, total // BYTES_PER_OWNER)
        assert len(owners) <= min(len(group), MAX_OWNERS)
        assert written.keys() <= set(owners)
        for rank in owners:
            assert abs(written[rank] - total / len(owners)) <= 2 * 4 * MIB + 1


def test_large_states_are_written_by_all() -> None:
    group = tuple(range(8))
    storages = [Replicated(((1, 0, f"{n:03}"),), 33 * MIB + 4 * n, 4 * MIB, group) for n in range(50)]
    written: Counter[int] = Counter()
    for shares in share_out(storages):
        for share in shares:
            written[share.rank] += share.n_bytes
    assert set(written) == set(group)
    assert max(written.values()) - min(written.values()) <= 4 * MIB


def test_small_states_have_few_owners_and_not_always_the_first() -> None:
    assert len(owners_of(tuple(range(64)), 100)) == 1
    assert len(owners_of(tuple(range(64)), 3 * BYTES_PER_OWNER)) == 3
    assert len(owners_of(tuple(range(1000)), 1 << 40)) == MAX_OWNERS
    pairs = [(first, first + 8) for first in range(8)]
    assert len({pairs.index(pair) for pair in pairs if owners_of(pair, 100) == (pair[0],)}) in range(1, 8)


def test_owners_are_spread_over_the_group() -> None:
    """Ranks of one machine follow each other: their line is shared."""
    group = tuple(range(64))
    owners = owners_of(group, 8 * BYTES_PER_OWNER)
    gaps = [(b - a) % 64 for a, b in zip(owners, (*owners[1:], owners[0]), strict=True)]
    assert gaps == [8] * 8
