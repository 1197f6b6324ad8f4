"""Which slab of a snapshot holds what, which one may be used again, and which one goes to the disk."""

from __future__ import annotations

import pytest

from fastckpt.format.element_types import element_type
from fastckpt.snapshot.copy_plan import CopyPlan
from fastckpt.snapshot.pool import SlabPool
from fastckpt.snapshot.progress import Copy
from fastckpt.snapshot.ring import Ring
from fastckpt.snapshot.slots import PAGE_BYTES, lay_out
from fastckpt.state.chunking import Chunk, Piece

ORDER = [5, 4, 3, 2, 1, 0]
"""Two chunks in each of three slabs; what is copied first has the highest number."""


class Case:
    """A state of three slabs that goes through two of them."""

    def __init__(self) -> None:
        self.pool = SlabPool(4 * PAGE_BYTES)
        layout = lay_out([PAGE_BYTES] * len(ORDER), 2 * PAGE_BYTES)
        plan = CopyPlan(ORDER, 0, layout, 2, for_device=False)
        assert plan.is_ring
        slabs = self.pool.take_all(plan.first_slabs, False)
        assert slabs is not None
        self.ring = Ring(self.pool, plan, slabs)
        element = element_type("uint8")
        assert element is not None
        by_number = [Copy(n, Chunk((Piece(n, 0, PAGE_BYTES),), element), PAGE_BYTES, None) for n in sorted(ORDER)]
        self.copies = [by_number[number] for number in ORDER]
        """In the order of their slots."""


@pytest.fixture
def case() -> Case:
    return Case()


def test_chunks_lie_in_slabs_in_the_order_of_their_copies(case: Case) -> None:
    assert [case.ring.slab_of(copy) for copy in case.copies] == [0, 0, 1, 1, 2, 2]
    for number, copy in enumerate(case.copies[:4]):
        case.ring.content(copy)[:] = number
    for number, copy in enumerate(case.copies[:4]):
        target, pinned = case.ring.target(copy)
        assert target.unique().tolist() == [number], "the same bytes, and nobody else's"
        assert not pinned


def test_a_slab_is_used_again_when_all_of_its_chunks_are_released(case: Case) -> None:
    upcoming = case.copies[4]
    assert not case.ring.take_slab(upcoming), "the budget holds two"
    assert not case.ring.release(case.copies[0])
    assert not case.ring.take_slab(upcoming)
    assert case.ring.release(case.copies[1])
    assert case.pool.used_bytes == 2 * PAGE_BYTES
    assert case.ring.take_slab(upcoming)
    assert case.ring.take_slab(case.copies[5]), "it is there already"
    assert case.pool.used_bytes == 4 * PAGE_BYTES
    case.pool.give_back(case.ring.take_out())
    assert case.pool.used_bytes == 0


def test_the_slab_that_is_needed_last_goes_to_the_disk_unless_its_reading_has_begun(case: Case) -> None:
    upcoming = case.copies[4]
    assert case.ring.farthest(upcoming) == (1, ORDER[2:4])
    case.ring.begin_reading(case.copies[2])
    assert case.ring.farthest(upcoming) == (0, ORDER[:2])
    case.ring.begin_reading(case.copies[0])
    assert case.ring.farthest(upcoming) is None


def test_a_slab_that_is_being_filled_stays(case: Case) -> None:
    assert case.ring.farthest(case.copies[3]) == (0, ORDER[:2])
    assert case.ring.farthest(case.copies[1]) is None


def test_nothing_goes_to_the_disk_once_all_copies_are_given_out(case: Case) -> None:
    assert case.ring.farthest(None) is None


def test_a_slab_that_has_gone_to_the_disk_is_not_given_back_twice(case: Case) -> None:
    case.ring.give_back(1)
    assert case.pool.used_bytes == 2 * PAGE_BYTES
    assert not case.ring.release(case.copies[2])
    assert not case.ring.release(case.copies[3])
    assert case.pool.used_bytes == 2 * PAGE_BYTES
