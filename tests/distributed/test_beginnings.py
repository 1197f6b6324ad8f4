"""Ranks that begin in other ways than rank 0: one error, the same on every rank, that names all differences; nothing is made for them."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import beginnings
from tests.support.ranks import run_ranks

N = 3


def told(tmp_path: Path, way: str) -> str:
    """What every rank is told: all the same."""
    found = run_ranks(N, beginnings.begin, f"{tmp_path}/run", way)
    assert len(set(found)) == 1, found
    return str(found[0])


def test_one_that_only_reads(tmp_path: Path) -> None:
    assert "read_only: False on rank 0, True on rank 2" in told(tmp_path, "read only")
    assert not (tmp_path / "run").exists()


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    words = told(tmp_path, "several at once")
    assert words.startswith("RanksError: the ranks of this job do not begin alike: ")
    for part in ("only rank 2 has 'ema'", "every: ", "fresh: False on rank 0, True on rank 2"):
        assert part in words, words


def test_a_directory_of_its_own_is_not_made(tmp_path: Path) -> None:
    words = told(tmp_path, "another directory")
    assert "1 of 3 ranks do not share the repository of rank 0" in words
    assert "rank 2: " in words
    assert not (tmp_path / "run-of-its-own").exists()


def test_one_that_leaves_out_restore(tmp_path: Path) -> None:
    words = (
        "ranks do not make the same calls of their Checkpointers: rank 0 is restoring, and rank 2 is beginning to save"
    )
    assert words in told(tmp_path, "no restore")


def test_a_store_for_one_writer_refuses_three(tmp_path: Path) -> None:
    assert "it is experimental. So one process may write here, and 3 want to" in told(tmp_path, "experimental store")
    assert not (tmp_path / "run").exists()
