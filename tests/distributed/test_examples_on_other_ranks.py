"""The examples go on with another number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import sampling
from tests.distributed.programs import TRAINS_FSDP2
from tests.support.ranks import run_ranks
from tests.support.torchrun import EXAMPLES

BATCH, SAMPLES = 24, 256
"""Of a step and of an epoch: 11 steps, the last of them with 16 samples."""


@pytest.mark.parametrize(("name", "before", "after"), [("train_ddp.py", 2, 3), ("train_fsdp2.py", 3, 1)])
def test_another_number_of_ranks(tmp_path: Path, name: str, before: int, after: int) -> None:
    """In the middle of the second epoch. Five or four processes: some 4 s."""
    if name == "train_fsdp2.py" and not TRAINS_FSDP2:
        pytest.skip("FSDP2 of this torch trains on no CPU")
    script, url = str(EXAMPLES / name), str(tmp_path / "run")
    assert run_ranks(before, sampling.train_example, script, url, 13) == [(0, 1, 2 * BATCH)] * before
    assert run_ranks(after, sampling.train_example, script, url, 20) == [(13, 1, 9 * BATCH)] * after
