"""What each rank had for itself, whole, is not spread over ranks as if it were one tensor."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import unalike
from tests.support.ranks import run_ranks


def test_plain_tensors_of_several_ranks_are_not_mixed(tmp_path: Path) -> None:
    for words in run_ranks(2, unalike.save_then_restore_spread, f"{tmp_path}/differs", True):
        assert "model.weight of rank 1 is not that of rank 0" in words
        assert "model.bias" not in words
    assert run_ranks(2, unalike.save_then_restore_spread, f"{tmp_path}/alike", False) == ["[1.0]"] * 2
