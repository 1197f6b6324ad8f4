"""The state of each rank among real ones: its parts are where the directory says, replicas are alike, and nobody is asked.

Over 5 s: each test starts processes that import torch.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.state_of_ranks import play

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="this torch cannot train FSDP2 on a CPU"
)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int) -> None:
    run_ranks(world, play)
