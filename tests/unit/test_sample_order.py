"""The order of an epoch: always a permutation, always the same one, and as good as a shuffled one."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.training.sample_order import MAX_LENGTH, SampleOrder

# (length, seed, epoch) → the samples at the places from a start on. A run that was saved with these orders goes on with them: whoever
# changes one of these numbers makes resumed runs see samples twice.
GOLDEN = {
    (1, 0, 0): (0, [0]),
    (2, 0, 1): (0, [1, 0]),
    (10, 0, 0): (0, [0, 3, 2, 6, 5, 7, 8, 1, 4, 9]),
    (10, 0, 1): (0, [8, 4, 1, 6, 0, 7, 2, 3, 9, 5]),
    (10, -7, 0): (0, [5, 9, 0, 2, 7, 6, 4, 8, 1, 3]),
    (1000, 1 << 70, 12): (990, [845, 266, 652, 617, 362, 402, 987, 186, 223, 956]),
    (10**9, 42, 3): (0, [71596225, 724253873, 947748592, 360333690]),
    (MAX_LENGTH, 42, 3): (MAX_LENGTH - 3, [1221061952056110036, 3424285124747996070, 1015238014177644159]),
}


def order(length: int, seed: int = 0, epoch: int = 0) -> SampleOrder:
    return SampleOrder(length, shuffle=True, seed=seed, epoch=epoch)


@pytest.mark.parametrize("which", GOLDEN)
def test_the_order_never_changes(which: tuple[int, int, int]) -> None:
    start, samples = GOLDEN[which]
    assert order(*which).samples(start, start + len(samples)) == samples


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(), st.integers(0, 10**6), st.data())
def test_each_sample_comes_once_wherever_the_epoch_is_entered(
    length: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    whole = order(length, seed, epoch).samples(0, length)
    assert sorted(whole) == list(range(length))
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    assert order(length, seed, epoch).samples(start, stop) == whole[start:stop]


def by_definition(length: int, seed: int, epoch: int, place: int) -> int:
    """Once more in plain integers, from the description in docs/decisions/0011."""
    columns = math.isqrt(length - 1) + 1
    rows = (length + columns - 1) // columns
    bits = (1 << 64) - 1

    def mixed(word: int) -> int:
        word &= bits
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & bits
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & bits
        return word ^ (word >> 31)

    while True:
        row, column = divmod(place, columns)
        for number in range(12):
            text = f"fastckpt order 1, seed {seed}, epoch {epoch}, round {number}"
            key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            if number % 2 == 0:
                column = (column + mixed(row + key) % columns) % columns
            else:
                row = (row + mixed(column + key) % rows) % rows
        place = row * columns + column
        if place < length:
            return place


@given(st.integers(1, MAX_LENGTH), st.integers(), st.integers(0, 10**6), st.data())
def test_it_is_what_its_description_says(length: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length - 1))
    stop = min(length, start + 3)
    expected = [by_definition(length, seed, epoch, place) for place in range(start, stop)]
    assert order(length, seed, epoch).samples(start, stop) == expected


@pytest.mark.parametrize("length", [2, 3, 5, 7])
def test_each_sample_comes_to_each_place_equally_often(length: int) -> None:
    """Fixed seeds, so the result is always the same: χ² of places × samples over 1,500 epochs, within five standard deviations."""
    counts = [[0] * length for _ in range(length)]
    for epoch in range(1500):
        for place, sample in enumerate(order(length, 5, epoch).samples(0, length)):
            counts[place][sample] += 1
    expected = 1500 / length
    chi = sum((n - expected) ** 2 / expected for row in counts for n in row)
    free = (length - 1) ** 2
    assert chi < free + 5 * math.sqrt(2 * free)


def test_neighbours_do_not_stay_neighbours() -> None:
    """Differences between samples that follow each other are as wide as those of random ones: a third of the length on average."""
    whole = order(20_000, 1, 0).samples(0, 20_000)
    steps = [abs(a - b) for a, b in itertools.pairwise(whole)]
    assert abs(sum(steps) / len(steps) / 20_000 - 1 / 3) < 0.01
    assert len(set(steps)) > 10_000 * 0.6


def test_without_shuffle_it_is_that_of_the_numbers() -> None:
    assert SampleOrder(10, shuffle=False, seed=3, epoch=4).samples(2, 5) == [2, 3, 4]
