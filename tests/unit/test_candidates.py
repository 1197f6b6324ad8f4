"""Which chunks get a fingerprint, and whose copies wait for it."""

from __future__ import annotations

import numpy as np

from fastckpt.snapshot.candidates import (
    LATELY_SAVES,
    LEARN_AGAIN_EVERY,
    LEARNING_SAVES,
    Flags,
    History,
    get_fingerprint,
    wait_for_theirs,
)

NONE, ALL = np.zeros(3, bool), np.ones(3, bool)


def flags(*numbers: int) -> Flags:
    return np.isin(np.arange(3), numbers)


def after(n_saves: int, unwritten: Flags, unchanged: Flags) -> History:
    history = History.none(3)
    for _ in range(n_saves):
        history = history.after(unwritten, ALL, unchanged)
    return history


def test_all_chunks_are_looked_at_in_the_first_saves_and_now_and_then() -> None:
    looked = [get_fingerprint(after(n, NONE, NONE), NONE).all() for n in range(2 * LEARN_AGAIN_EVERY)]
    expected = {*range(LEARNING_SAVES), LEARN_AGAIN_EVERY, LEARN_AGAIN_EVERY + 1}
    assert {n for n, all_of_them in enumerate(looked) if all_of_them} == expected


def test_a_state_that_always_changes_gets_no_others() -> None:
    history = after(LEARNING_SAVES, NONE, NONE)
    assert not get_fingerprint(history, NONE).any()
    assert not wait_for_theirs(history, NONE, ALL, ALL).any()


def test_what_was_unchanged_lately_is_looked_at_and_waits_behind_the_fence_only() -> None:
    history = after(LEARNING_SAVES, NONE, flags(1))
    for _ in range(LATELY_SAVES):
        assert (get_fingerprint(history, NONE) == flags(1)).all()
        assert (wait_for_theirs(history, NONE, ALL, ALL) == flags(1)).all()
        assert not wait_for_theirs(history, NONE, NONE, ALL).any()
        history = history.after(NONE, ALL, NONE)
    assert not get_fingerprint(history, NONE).any()


def test_what_torch_has_not_written_to_waits_even_without_a_fence() -> None:
    history = after(LEARNING_SAVES, flags(0, 2), flags(0, 2))
    assert (wait_for_theirs(history, flags(0, 2), NONE, ALL) == flags(0, 2)).all()
    assert (wait_for_theirs(history, flags(0, 2), NONE, flags(2)) == flags(2)).all(), (
        "one that has no fingerprint cannot"
    )
    assert (wait_for_theirs(History.none(3), flags(0), NONE, ALL) == flags(0)).all()


def test_a_chunk_that_changes_although_torch_counts_nothing_is_not_trusted_until_it_was_unchanged_once() -> None:
    history = after(LEARNING_SAVES, ALL, flags(1, 2))
    assert (wait_for_theirs(history, ALL, NONE, ALL) == flags(1, 2)).all()
    history = history.after(ALL, flags(1, 2), flags(1, 2))
    assert (wait_for_theirs(history, ALL, NONE, ALL) == flags(1, 2)).all(), "it was not looked at"
    history = history.after(ALL, ALL, ALL)
    assert wait_for_theirs(history, ALL, NONE, ALL).all()
