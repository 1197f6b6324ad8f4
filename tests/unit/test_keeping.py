"""The rules of retention: what each keeps, together, and while time goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.format.keys import CheckpointId
from fastckpt.repository.keeping import Candidate, Keep, not_kept
from fastckpt.repository.retention import Pins, RepositoryView, plan_retention
from tests.support.keeping import histories, keeps


def kept_by_model(history: list[Candidate], keep: Keep, now_s: float) -> set[CheckpointId]:
    """Rule by rule, as slowly as the words say."""
    age = {c.checkpoint: n for n, c in enumerate(reversed(history))}
    kept = {c.checkpoint for c in history[: keep.last]}
    for c in history:
        if c.checkpoint.step in keep.steps or (keep.every and c.checkpoint.step % keep.every == 0):
            kept.add(c.checkpoint)
        if keep.for_minutes is not None and now_s - c.committed_s < 60 * keep.for_minutes:
            kept.add(c.checkpoint)
    if keep.every_minutes is not None:
        for multiple in range(-200, 201):  # histories span a hundred times the shortest interval
            place_s = history[-1].committed_s + multiple * 60 * keep.every_minutes
            nearest = min(
                history, key=lambda c: (abs(c.committed_s - place_s), c.committed_s, age[c.checkpoint])
            ).checkpoint
            kept.add(nearest)
    if keep.best is not None:
        sign = 1 if keep.mode == "min" else -1
        real = [c for c in history if not math.isnan(c.metrics.get(keep.best, math.nan))]
        if not real:
            return set(age)
        real.sort(key=lambda c: (sign * c.metrics[keep.best], age[c.checkpoint]))
        kept |= {c.checkpoint for c in real[: keep.best_count]}
    return kept


@given(histories(), keeps, st.integers(-30, 100))
def test_what_stays_is_what_some_rule_keeps(history: list[Candidate], keep: Keep, now: int) -> None:
    gone = not_kept(history, keep, 15.0 * now)
    stay = {c.checkpoint for c in history} - set(gone)
    assert stay == (kept_by_model(history, keep, 15.0 * now) if history else set())


@given(histories(), keeps, st.integers(-30, 100))
def test_the_newest_stays_whatever_is_asked(history: list[Candidate], keep: Keep, now: int) -> None:
    assert not history or history[0].checkpoint not in not_kept(history, keep, 15.0 * now)


@given(histories(), st.sampled_from([0.5, 1, 2.5, 7]))
def test_what_was_dropped_while_time_went_on_is_what_would_be_dropped_in_the_end(
    history: list[Candidate], minutes: float
) -> None:
    """Nobody needs to keep everything until all multiples are known; clocks may step."""
    keep = Keep(last=1, every_minutes=minutes)
    there: list[Candidate] = []
    for candidate in reversed(history):
        there.insert(0, candidate)
        gone = not_kept(there, keep, 0.0)
        there = [c for c in there if c.checkpoint not in gone]
    gone = not_kept(history, keep, 0.0)
    assert there == [c for c in history if c.checkpoint not in gone]


def at_minutes(*minutes: float) -> list[Candidate]:
    """Step n is of the nth of these minutes."""
    return [Candidate(CheckpointId(1, n), {}, 1e9 + 60 * minute) for n, minute in enumerate(minutes)][::-1]


def steps_kept(history: list[Candidate], keep: Keep, now_s: float = 0.0) -> list[int]:
    gone = not_kept(history, keep, now_s)
    return sorted(c.checkpoint.step for c in history if c.checkpoint not in gone)


@pytest.mark.parametrize(
    ("minutes", "kept"),
    [
        ((0, 10, 20, 29, 41, 50, 58, 70, 90, 95), [0, 3, 6, 8, 9]),
        ((0, 100, 101), [0, 1, 2]),
        ((0, 15, 30), [0, 2]),
        ((0, 20, 40, 41), [0, 1, 3]),
        ((0, 10, 31, -500, 45, 61), [0, 2, 3, 5]),
    ],
    ids=["nearest", "nothing near a multiple", "on it", "as near from both sides", "a clock that stepped once"],
)
def test_every_half_an_hour(minutes: tuple[float, ...], kept: list[int]) -> None:
    assert steps_kept(at_minutes(*minutes), Keep(last=1, every_minutes=30)) == kept


def test_for_a_time() -> None:
    history = at_minutes(0, 10, 20, 30, 40, 50)
    now_s = history[0].committed_s
    assert steps_kept(history, Keep(last=1, for_minutes=30), now_s) == [3, 4, 5]
    assert steps_kept(history, Keep(last=1, for_minutes=30, every=2), now_s) == [0, 2, 3, 4, 5]
    assert steps_kept(history, Keep(last=1, for_minutes=30), now_s + 1e6) == [5]


def test_steps_that_somebody_named() -> None:
    assert steps_kept(at_minutes(0, 1, 2, 3, 4), Keep(last=1, steps=[1, 3, 77])) == [1, 3, 4]
    assert Keep(steps=[3, 1, 3]) == Keep(steps=(1, 3))
    assert hash(Keep(steps={1})) == hash(Keep(steps=(1,)))


VIEW = RepositoryView(
    newest_epoch=1,
    history=[],
    living={},
    tombstones={},
    commit_times_s={},
    unreadable=(),
    votes={},
    vote_sets={},
    packs={},
    needed=set(),
    pins=Pins(),
    now_s=0.0,
)


def candidates(*metrics: Mapping[str, float]) -> list[Candidate]:
    """Newest first."""
    return [Candidate(CheckpointId(1, len(metrics) - n), found) for n, found in enumerate(metrics)]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ([{"val_loss": 0.7}, {"val_loss": 0.1}, {}], "Did you mean 'val_loss'?"),
        ([{}, {}], "there are: none"),
        ([{"accuracy": 1.0}, {}], "there are: 'accuracy'"),
        ([{"val_los": math.nan}, {}, {"val_los": math.nan}], "NaN in every checkpoint"),
    ],
)
def test_the_best_of_what_nobody_measured_deletes_nothing_and_is_told(
    metrics: list[Mapping[str, float]], words: str
) -> None:
    history = candidates(*metrics)
    keep = Keep(last=1, best="val_los")
    found = plan_retention(replace(VIEW, history=history), keep, (), 0.0)
    assert not found.retire
    (warning,) = found.warnings
    assert "'val_los'" in warning
    assert words in warning
    assert not plan_retention(replace(VIEW, history=history), Keep(last=9, best="val_los"), (), 0.0).warnings, (
        "nothing is at stake"
    )


def test_once_the_metric_is_there_the_rule_is_followed() -> None:
    history = candidates({"loss": 0.5}, {}, {"loss": math.nan}, {"loss": 0.1}, {"other": 0.0}, {"loss": 0.2})
    found = plan_retention(replace(VIEW, history=history), Keep(last=1, best="loss"), (), 0.0)
    assert sorted(checkpoint.step for checkpoint, _ in found.retire) == [1, 2, 4, 5]
    assert not found.warnings


@pytest.mark.parametrize(
    "bad",
    [
        {"last": 0},
        {"last": True},
        {"last": None},
        {"every": 0},
        {"every": 2.0},
        {"mode": "most"},
        {"mode": ["min"]},
        {"best_count": 0},
        {"best_count": 1.0},
        {"best": ""},
        {"best": " "},
        {"best": 0.5},
        {"best": True},
        {"best": ["loss"]},
        {"best": ("loss", "min")},
        {"best": b"loss"},
        {"every_minutes": 0},
        {"every_minutes": math.nan},
        {"every_minutes": True},
        {"for_minutes": -1},
        {"for_minutes": math.inf},
        {"for_minutes": "10"},
        {"steps": 5},
        {"steps": [-1]},
        {"steps": [1.0]},
        {"max_grace_bytes": -1},
        {"max_grace_bytes": 1e9},
    ],
    ids=repr,
)
def test_senseless_rules_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Keep(**bad)  # type: ignore[arg-type]
