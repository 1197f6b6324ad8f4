"""Ranks that read straight into their tensors: the same as all loaded first; and if one of them fails, all know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import straight_programs as programs
from tests.distributed.programs import NEEDS_FSDP2, TRAINS_FSDP2
from tests.distributed.test_falling_back import damage
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_it_is_what_a_load_of_all_gives(tmp_path: Path, kind: str) -> None:
    if kind in NEEDS_FSDP2 and not TRAINS_FSDP2:
        pytest.skip("FSDP2 of this torch does not train on a CPU")
    url = f"{tmp_path}/run"
    run_ranks(2, programs.save_two, url, kind)
    asked = [{"step": 1}, {"step": 2, "atomic": True}, {"step": 1}, {"step": 2}, {"step": 2, "overlap": True}]
    for said, results in run_ranks(2, programs.restore, url, kind, asked):
        ways = ["step 1, some", "step 2, none", "step 1, some", "step 2, some", "step 2, some"]
        assert said == [*(f"{way} straight" for way in ways), "saved"]
        assert results == [False, True, False, True, True]


def test_damage_that_one_rank_finds_when_all_have_written(tmp_path: Path) -> None:
    url = f"{tmp_path}/run"
    run_ranks(2, programs.save_two, url, "plain")
    damage(Path(url), 1)
    asked = [{"atomic": True}, {}, {"step": "latest-valid"}, {}]
    for said, _ in run_ranks(2, programs.restore, url, "plain", asked):
        assert said[0].startswith("CorruptCheckpointError, unchanged"), said
        assert said[1].startswith("PartialRestoreError, changed"), said
        assert "rank 1" in said[1]
        assert "restore(step=1)" in said[1]
        assert said[2] == "step 1, none straight"
        assert said[3].startswith("step 1"), "the epoch that latest-valid has claimed"
        assert said[4] == "saved"
