"""Another job takes over while one of several ranks still runs: every rank of the older one learns it."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import programs
from tests.support.ranks import join, run_ranks, started


def test_the_older_job_is_superseded_on_every_rank(tmp_path: Path) -> None:
    url, told = f"{tmp_path}/run", tmp_path / "told"
    with started(2, programs.save_when_told, url, str(told)) as ranks:
        for rank in ranks:
            rank.wait_for("saved")
        newer = run_ranks(2, programs.train, url, "plain", 5, 5, 0)
        assert [one["start"] for one in newer] == [1, 1]
        told.touch()
        join(ranks)
        for rank in ranks:
            assert rank.result.startswith("SupersededError"), rank.result
    assert run_ranks(2, programs.restored_step, url, "plain") == [5, 5]  # not the older job's step 2
