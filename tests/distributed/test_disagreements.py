"""Ranks that disagree: one error, on every rank, that names the difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import programs
from tests.support.ranks import run_ranks


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("keys", "keys of the state: only rank 1 has 'ema'"),
        ("every", "every: 'Every(steps=5, minutes=None, when=None)' on rank 0, 'Every(steps=6"),
        ("repository", "1 of 2 ranks do not share the repository of rank 0"),
        ("step", "rank 1 saves step 6, and rank 0 step 5, at the same call"),
    ],
)
def test_what_ranks_must_do_alike(tmp_path: Path, what: str, words: str) -> None:
    """The error of ranks whose steps differ comes after 2 s, when others might still have come."""
    errors = run_ranks(2, programs.begin_otherwise, f"{tmp_path}/run", what)
    if what == "step":  # whoever finds it first names it first
        assert all("at the same call" in error and "step 5" in error and "step 6" in error for error in errors), errors
        return
    assert all(words in error for error in errors), errors
    if what == "every":  # all differences are told at once
        assert all("samplers: only rank 0 has" in e and "shuffle=True, seed=1" in e for e in errors), errors


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    """`join_timeout_s` is 5 s here, and ranks are taken for dead after 2."""
    errors = run_ranks(3, programs.begin_otherwise, f"{tmp_path}/run", "never comes")
    for rank in (0, 2):
        assert "RanksError: making a Checkpointer: nothing was heard of rank 1 of 3" in errors[rank], errors


def test_replicas_that_differ(tmp_path: Path) -> None:
    """Found where it is asked for, and named; nothing is committed."""
    said = run_ranks(2, programs.save_and_tell, f"{tmp_path}/run", "ddp", 1, {"verify_replicas": True})
    for words in said:
        assert "ranks 0 and 1 do not hold alike what they should: model.layers.0.a.bias" in words, said
        assert "Nothing was committed" in words
    assert run_ranks(2, programs.save_and_tell, f"{tmp_path}/run", "ddp", None, {"verify_replicas": True}) == ["", ""]


def test_what_the_user_declares_is_written_once(tmp_path: Path) -> None:
    settings = {"replicated": ["model", "optimizer.state"]}
    assert run_ranks(2, programs.save_and_tell, f"{tmp_path}/once", "plain", None, settings) == ["", ""]
    assert run_ranks(2, programs.save_and_tell, f"{tmp_path}/twice", "plain", None, {}) == ["", ""]

    def packs(name: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / name / "data").rglob("*.pack"))

    assert packs("once") < 0.6 * packs("twice")
