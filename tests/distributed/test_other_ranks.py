"""Another number of ranks: what each saved rank had for itself is refused by name, or reassigned; everything else comes back."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import programs
from tests.support.ranks import run_ranks


def test_what_was_a_ranks_own_needs_a_word(tmp_path: Path) -> None:
    """Two ranks, then three: some 8 s."""
    url = f"{tmp_path}/run"
    run_ranks(2, programs.save_own_things, url)
    for found in run_ranks(3, programs.restore_own_things, url, "nothing"):
        assert found.startswith("RestoreError: ")
        assert "was saved by 2 ranks, and this job has 3" in found
        assert "'rng': random generators" in found
        assert "'own': own.place of rank 1 is not that of rank 0" in found
        assert "'loader': loader.position of rank 1" in found
        assert "reassign=" in found
        assert "'model'" not in found
        assert "'alike'" not in found
    found = run_ranks(3, programs.restore_own_things, url, "reassigned")
    assert found == [
        f"model 2.5, alike [1, 'x'], own {rank % 2}.0, position {10 * (rank % 2)}, rng {rank % 2}, kept 7"
        for rank in range(3)
    ]


def test_pipeline_stages_on_one_rank(tmp_path: Path) -> None:
    """The second stage has a layer more; the optimizers number their parameters for themselves, and are refused."""
    url = f"{tmp_path}/run"
    run_ranks(2, programs.save_stages, url)
    (found,) = run_ranks(1, programs.restore_stages, url)
    assert found["model"] == "2 layers equal"
    assert "'optimizer': optimizer.param_groups.0.params of rank 1" in found["error"]
