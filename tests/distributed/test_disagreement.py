"""Ranks that do not begin alike: one error, the same on every rank, that names all differences; nothing is written over, nobody waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import beginnings
from tests.support.ranks import run_ranks

N = 3
NOT_ALIKE = "RanksError: the ranks of this job do not begin alike: "


def told(tmp_path: Path, way: str) -> str:
    """What every rank is told: all the same."""
    found = run_ranks(N, beginnings.begin, f"{tmp_path}/run", way)
    assert len(set(found)) == 1, found
    return str(found[0])


@pytest.mark.parametrize(
    ("way", "difference"),
    [
        ("another key", "state: only rank 0 has 'epoch', only rank 2 has 'ema'"),
        ("another rule", "every: 'Every(steps=5, minutes=None, when=None)' on rank 0, 'Every(steps=None, minutes=5, when=None)' on rank 2"),
        ("read only", "read_only: False on rank 0, True on rank 2"),
    ],
)
def test_what_differs_is_named_on_every_rank(tmp_path: Path, way: str, difference: str) -> None:
    assert told(tmp_path, way) == NOT_ALIKE + difference
    assert not (tmp_path / "run").exists()


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    words = told(tmp_path, "several at once")
    assert words.startswith(NOT_ALIKE)
    assert words.count("; ") == 2
    for part in ("state: only rank 2 has 'ema'", "every: ", "fresh: False on rank 0, True on rank 2"):
        assert part in words


def test_a_directory_of_its_own(tmp_path: Path) -> None:
    words = told(tmp_path, "another directory")
    assert "1 of 3 ranks do not share the repository of rank 0" in words
    assert "rank 2: " in words
    assert not (tmp_path / "run-of-its-own").exists()


def test_a_rank_that_leaves_out_restore(tmp_path: Path) -> None:
    words = "ranks do not make the same calls of their Checkpointers: rank 0 is restoring, and rank 2 is beginning to save"
    assert words in told(tmp_path, "no restore")


def test_a_rank_that_saves_another_step(tmp_path: Path) -> None:
    found = run_ranks(N, beginnings.begin, f"{tmp_path}/run", "another step")
    for words in found:
        assert words.startswith("AbandonedError")
        assert "step 2" in words
        assert "step 1" in words
