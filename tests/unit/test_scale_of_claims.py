"""Summaries of thousands of ranks that name the same group are small in memory."""

from __future__ import annotations

import tracemalloc

from fastckpt.format.shares import GroupClaim, group_of_json, group_to_json


def test_a_group_that_many_name_is_held_once() -> None:
    claim = GroupClaim(tuple(range(16_384)), "0" * 32)
    text = group_to_json(claim)
    tracemalloc.start()
    found = [group_of_json(text) for _ in range(1000)]
    used_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert found[0] == found[-1] == claim
    assert used_bytes < 2 << 20


def test_groups_of_every_form_come_back() -> None:
    for ranks in ((3,), (0, 1), (0, 8, 16), (1, 2, 4), (0, 7)):
        claim = GroupClaim(ranks, "a" * 32)
        assert group_of_json(group_to_json(claim)) == claim
