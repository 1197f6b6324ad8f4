"""Slabs of host memory: counted exactly, shared by threads, and how chunks lie in them."""

from __future__ import annotations

import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.snapshot import pool as pool_module
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.slots import PAGE_BYTES, lay_out, slab_limit
from tests.support.host_training import MIB, SHORT_S


class Memory:
    """What stands behind a pool: counts what is alive, and fails when it is told to."""

    def __init__(self) -> None:
        self.live_bytes = self.made = 0
        self.pinnable, self.there = True, True

    def _tensor(self, n_bytes: int) -> torch.Tensor:
        tensor = torch.empty(n_bytes, dtype=torch.uint8)
        self.live_bytes += n_bytes
        self.made += 1
        weakref.finalize(tensor, self._gone, n_bytes)
        return tensor

    def _gone(self, n_bytes: int) -> None:
        self.live_bytes -= n_bytes

    def pinned(self, n_bytes: int) -> torch.Tensor:
        if not self.there:
            raise MemoryError("as the test wants it")
        if not self.pinnable:
            raise RuntimeError("cannot be pinned, as the test wants it")
        return self._tensor(n_bytes)

    def pageable(self, n_bytes: int) -> torch.Tensor:
        if not self.there:
            raise MemoryError("as the test wants it")
        return self._tensor(n_bytes)


SIZES = [PAGE_BYTES << n for n in range(5)]
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from(SIZES), st.booleans()),
        st.tuples(st.just("take_all"), st.lists(st.sampled_from(SIZES), max_size=4), st.booleans()),
        st.tuples(st.just("give_back"), st.integers(0, 99), st.integers(1, 3)),
        st.tuples(st.just("forget"), st.integers(0, 99), st.integers(1, 2)),
        st.tuples(st.sampled_from(["pinnable", "there"]), st.booleans(), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(budget=st.integers(0, 40).map(lambda pages: pages * PAGE_BYTES), acts=ACTS)
def test_slabs_are_counted_exactly(budget: int, acts: list[tuple[Any, Any, Any]]) -> None:
    memory = Memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "pageable", memory.pageable)
        patch.setattr(pool_module, "empty_host_cache", lambda: None)  # there may be no device whose cache it is
        _check_slabs(SlabPool(budget, memory.pinned), memory, acts)


def _check_slabs(pool: SlabPool, memory: Memory, acts: list[tuple[Any, Any, Any]]) -> None:
    held: list[Slab] = []
    lost: list[Slab] = []
    free: dict[int, Slab] = {}
    """By id; what was dropped since is in it, too."""
    unpinned = 0

    def got(slab: Slab, n_bytes: int, for_device: bool) -> None:
        nonlocal unpinned
        assert slab.n_bytes == n_bytes == slab.tensor.numel() == slab.array.size
        assert slab.tensor.data_ptr() == slab.array.ctypes.data
        assert slab.for_device is for_device
        assert slab.pinned is False or for_device
        assert all(slab is not other for other in [*held, *lost]), "somebody has it"
        if free.pop(id(slab), None) is None and for_device and not slab.pinned:
            unpinned += n_bytes
        held.append(slab)

    def taking(take: Callable[[], Any]) -> Any:
        try:
            return take()
        except MemoryError:
            assert not memory.there
            return None

    for act, first, second in acts:
        used = pool.used_bytes
        if act == "take":
            waiting = sum(s.n_bytes == first and s.for_device is second for s in _kept(pool))
            made = memory.made
            slab = taking(lambda first=first, second=second: pool.take(first, second))  # type: ignore[misc]
            if slab is not None:
                got(slab, first, second)
                assert (memory.made == made) == bool(waiting), "those that wait are used before others are made"
            elif memory.there:
                assert used + first > pool.budget_bytes
                assert not waiting
        elif act == "take_all":
            slabs = taking(lambda first=first, second=second: pool.take_all(first, second))  # type: ignore[misc]
            if slabs is None:
                assert pool.used_bytes == used, "all or nothing"
                if memory.there:
                    assert used + sum(first) > pool.budget_bytes
                free.update({id(slab): slab for slab in _kept(pool)})
                unpinned = pool.unpinned_bytes  # of those that were made and given back at once
            else:
                for slab, n_bytes in zip(slabs, first, strict=True):
                    got(slab, n_bytes, second)
        elif act in ("give_back", "forget"):
            chosen = [held.pop(first % len(held)) for _ in range(min(second, len(held)))]
            if act == "forget":
                lost += chosen
                pool.forget(chosen)
            else:
                pool.give_back(chosen)
                free.update({id(slab): slab for slab in chosen})
        else:
            setattr(memory, act, first)
        slab = slabs = chosen = None  # type: ignore[assignment]
        kept = _kept(pool)
        free = {id(one): one for one in kept}
        assert pool.used_bytes == sum(one.n_bytes for one in held)
        assert pool.held_bytes == pool.used_bytes + sum(one.n_bytes for one in kept) <= pool.budget_bytes
        assert memory.live_bytes == pool.held_bytes + sum(one.n_bytes for one in lost), "what is dropped is freed"
        assert pool.unpinned_bytes == unpinned
    pool.give_back(held)
    assert pool.used_bytes == 0


def _kept(pool: SlabPool) -> list[Slab]:
    return [slab for slabs in pool._free.values() for slab in slabs]


def test_threads_share_a_pool() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    pool = SlabPool(64 * PAGE_BYTES)
    owner: dict[int, int] = {}
    failed: list[BaseException] = []

    def work(number: int) -> None:
        draw, mine = random.Random(seed + number), list[Slab]()
        try:
            for _ in range(1500):
                if draw.random() < 0.55:
                    slabs = pool.take_all([PAGE_BYTES << draw.randrange(4) for _ in range(draw.randrange(1, 4))], False)
                    for slab in slabs or []:
                        assert owner.setdefault(id(slab), number) == number
                        mine.append(slab)
                elif mine:
                    slab = mine.pop(draw.randrange(len(mine)))
                    del owner[id(slab)]
                    pool.give_back([slab])
                assert pool.used_bytes <= pool.budget_bytes
            for slab in mine:
                del owner[id(slab)]
            pool.give_back(mine)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SHORT_S)
    assert not failed
    assert pool.used_bytes == 0
    assert pool.held_bytes == sum(slab.n_bytes for slab in _kept(pool)) <= pool.budget_bytes


@settings(max_examples=200)
@given(
    budget=st.integers(16 * 1024, 512 * MIB),
    sizes=st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=60),
)
def test_chunks_lie_apart_and_in_their_slabs(budget: int, sizes: list[int]) -> None:
    limit = slab_limit(budget, max(sizes))
    if not limit:
        assert 2 * max(PAGE_BYTES, 1 << (max(sizes) - 1).bit_length()) > budget
        return
    assert 2 * limit <= budget
    layout = lay_out(sizes, limit)
    end: dict[int, int] = {}
    for slot, n_bytes in zip(layout.slots, sizes, strict=True):
        assert slot.offset % PAGE_BYTES == 0
        assert slot.offset >= end.get(slot.slab, 0)
        end[slot.slab] = slot.offset + n_bytes
    assert list(end) == list(range(len(layout.slab_bytes))), "in order"
    assert all(end[slab] <= n_bytes <= limit for slab, n_bytes in enumerate(layout.slab_bytes))
    assert all(n_bytes & (n_bytes - 1) == 0 for n_bytes in layout.slab_bytes)


@settings(max_examples=200)
@given(
    budget=st.integers(256 * 1024, 512 * MIB),
    chunks=st.lists(st.tuples(st.integers(1, 4 * MIB), st.sampled_from(["", "exp_avg", "exp_avg_sq"])), min_size=1),
)
def test_roles_fill_slabs_of_their_own_and_share_the_last_ones(budget: int, chunks: list[tuple[int, str]]) -> None:
    sizes, roles = [n_bytes for n_bytes, _ in chunks], [role for _, role in chunks]
    limit = slab_limit(budget, max(sizes))
    if not limit:
        return
    layout = lay_out(sizes, limit, roles)
    end: dict[int, int] = {}
    inside: dict[int, set[str]] = {}
    for slot, (n_bytes, role) in zip(layout.slots, chunks, strict=True):
        assert slot.offset % PAGE_BYTES == 0
        assert slot.offset >= end.get(slot.slab, 0)
        end[slot.slab] = slot.offset + n_bytes
        inside.setdefault(slot.slab, set()).add(role)
    assert sorted(end) == list(range(len(layout.slab_bytes)))
    assert all(end[slab] <= n_bytes <= limit for slab, n_bytes in enumerate(layout.slab_bytes))
    rests = Counter[str]()
    for slot, (n_bytes, role) in zip(layout.slots, chunks, strict=True):
        if len(inside[slot.slab]) > 1:
            rests[role] += n_bytes
    assert all(n_bytes < limit for n_bytes in rests.values()), "only what does not fill a slab"
    if len(set(roles)) == 1:
        assert layout == lay_out(sizes, limit), "one role: as if there were none"
