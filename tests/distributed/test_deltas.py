"""Differences on other ranks: what four have saved is the base of what three save, and a step that the run goes back to is one, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import delta_programs
from tests.distributed.programs import TRAINS_FSDP2
from tests.support.ranks import run_ranks


@pytest.mark.skipif(not TRAINS_FSDP2, reason="FSDP2 of this torch does not train on a CPU")
def test_four_ranks_then_three_and_back(tmp_path: Path) -> None:
    """Four ranks, three, three, and two: some 15 s."""
    url = f"{tmp_path}/run"
    begun = run_ranks(4, delta_programs.begin, url)
    for found in run_ranks(3, delta_programs.go_on, url):
        assert found["placed"] > 0.97, "all but bundles of small tensors"
        assert found["placed"] >= found["lent"] > 0.97, "all but what each rank has for itself: generators"
        assert found["back"] > 0.97
        for step in ("step 4", "step 5", "step 6"):
            assert found[step]["stored"] < 1.15 * begun[0][2]["stored"]
    assert not any(run_ranks(2, delta_programs.look, url, [3, 4, 6]))
