"""Plans of ranges: every wanted chunk once, within the limits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.format import records
from fastckpt.options import DECODER_BYTES, Options
from fastckpt.reading.ranges import Limits, Range, limits_for, plan, whole_files
from fastckpt.reading.reads import Reads


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Any, list[int], Limits]:
    """Records of a few files, some of them wanted in some order."""
    n = draw(st.integers(1, 40))
    chunks = np.zeros(n, records.LAYOUT)
    ends: dict[int, int] = {}
    for number in range(n):
        file = draw(st.integers(0, 3))
        start = ends.get(file, 64) + draw(st.sampled_from([0, 0, 0, 5, 100]))
        stored = draw(st.sampled_from([0, 1, 10, 60, 200]))
        chunks[number]["file"], chunks[number]["offset"], chunks[number]["stored_bytes"] = file, start, stored
        chunks[number]["raw_bytes"] = max(1, stored) * draw(st.integers(1, 3))
        ends[file] = start + stored
    wanted = draw(st.permutations(range(n)).map(list)) if draw(st.booleans()) else list(range(n))
    wanted = wanted[: draw(st.integers(1, n))]
    limits = Limits(
        range_bytes=draw(st.integers(1, 400)),
        gap_bytes=draw(st.integers(0, 100)),
        over_read=draw(st.floats(0.0, 0.9)),
        raw_bytes=draw(st.integers(1, 1000)),
        reach_bytes=draw(st.integers(1, 2000)),
    )
    return chunks, wanted, limits


def stored_bytes(range_: Range, chunks: Any) -> int:
    return int(chunks["stored_bytes"][list(range_.chunks)].sum())


@given(worlds())
def test_each_wanted_chunk_is_in_one_range_that_keeps_the_limits(world: tuple[Any, list[int], Limits]) -> None:
    chunks, wanted, limits = world
    ranges = plan(wanted, chunks, limits)
    assert sorted(chunk for one in ranges for chunk in one.chunks) == sorted(wanted)
    order = {chunk: at for at, chunk in enumerate(wanted)}
    begun = [order[one.chunks[0]] for one in ranges]
    assert begun == sorted(begun), "not in the order in which they are needed"
    raw_before = np.concatenate([[0], np.cumsum([int(chunks["raw_bytes"][chunk]) for chunk in wanted])])
    for one in ranges:
        places = [order[chunk] for chunk in one.chunks]
        assert places == sorted(places)
        for chunk in one.chunks:
            assert chunks["file"][chunk] == one.file
            if chunks["stored_bytes"][chunk]:
                assert one.start <= chunks["offset"][chunk]
                assert chunks["offset"][chunk] + chunks["stored_bytes"][chunk] <= one.stop
        assert one.stop - one.start >= stored_bytes(one, chunks)
        if len(one.chunks) == 1:
            assert one.stop - one.start == stored_bytes(one, chunks)
            continue
        holding = [chunk for chunk in one.chunks if chunks["stored_bytes"][chunk]]
        if len(holding) > 1:
            assert one.stop - one.start <= limits.range_bytes
            over = one.stop - one.start - stored_bytes(one, chunks)
            assert over <= limits.over_read * (one.stop - one.start)
            ends = sorted((int(chunks["offset"][c]), int(chunks["stored_bytes"][c])) for c in holding)
            gaps = [after[0] - (at + n) for (at, n), after in itertools.pairwise(ends)]
            assert max(gaps) <= limits.gap_bytes
        assert int(chunks["raw_bytes"][list(one.chunks)].sum()) <= limits.raw_bytes
        assert raw_before[places[-1] + 1] - raw_before[places[0]] <= limits.reach_bytes


def test_chunks_side_by_side_are_read_together() -> None:
    chunks = np.zeros(6, records.LAYOUT)
    chunks["raw_bytes"] = chunks["stored_bytes"] = 2 << 20
    chunks["offset"] = 64 + np.arange(6) * (2 << 20)
    found = plan(range(6), chunks, Limits())
    assert [one.chunks for one in found] == [(0, 1, 2, 3), (4, 5)]
    assert [(one.start, one.stop) for one in found] == [(64, 64 + (8 << 20)), (64 + (8 << 20), 64 + (12 << 20))]
    assert plan([], chunks, Limits()) == []


def test_chunks_of_several_files_in_turn_are_read_together_too() -> None:
    """As a reshard needs them: a row of this rank's, a row of that rank's."""
    chunks = np.zeros(8, records.LAYOUT)
    chunks["raw_bytes"] = chunks["stored_bytes"] = 1 << 20
    chunks["file"] = np.arange(8) % 2
    chunks["offset"] = 64 + np.arange(8) // 2 * (1 << 20)
    assert [one.chunks for one in plan(range(8), chunks, Limits())] == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_limits_follow_what_there_is_to_read() -> None:
    assert limits_for(20 << 20, 16).range_bytes == (20 << 20) // 16
    assert limits_for(1 << 40, 16).range_bytes == Limits().range_bytes
    assert limits_for(0, 0).range_bytes == 1 << 20
    assert whole_files(1 << 40, 2).raw_bytes == Limits().raw_bytes
    assert whole_files(64 << 20, 16).raw_bytes == 4 << 20


@given(st.integers(1, 64), st.integers(24 << 20, 1 << 30) | st.just(0), st.integers(1, 200))
def test_a_load_keeps_within_its_extra_memory(threads: int, extra_bytes: int, connections: int) -> None:
    options = Options(threads=threads, load_extra_bytes=extra_bytes, connections=connections)
    reads = Reads.of(options)
    assert 1 <= reads.at_once <= 64
    assert 1 <= options.load_threads <= threads
    least = limits_for(1 << 40, reads.at_once, reads.buffers_bytes // reads.at_once).range_bytes
    assert least * reads.at_once <= reads.buffers_bytes
    taken = options.load_threads * DECODER_BYTES + reads.at_once * (2 << 20) + reads.buffers_bytes + reads.window_bytes
    assert taken <= options.load_extra_bytes
    for has_window in (True, False):
        chains = reads.with_chains(has_window=has_window)
        parts = chains.buffers_bytes, chains.parked_bytes, chains.window_bytes, chains.scratch_bytes
        assert sum(parts) == reads.buffers_bytes + reads.window_bytes
        assert bool(chains.window_bytes) == has_window
    assert min(chains) >= 0
