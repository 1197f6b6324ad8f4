"""Between the call of a save and its being durable no rank waits for another one: not one collective, message or barrier is begun.

Everything in torch.distributed that communicates is counted, in all threads of real gloo ranks: tests/distributed/collectives.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import collectives, programs
from tests.support.ranks import run_ranks

MODES = [
    mode
    for mode in ("plain", "ddp", "fsdp", "tp", "hsdp", "fsdp_tp")
    if programs.TRAINS_FSDP2 or mode not in programs.NEEDS_FSDP2
]


def test_what_communicates_is_counted(tmp_path: Path) -> None:
    for seen in run_ranks(2, collectives.seen_of_each_kind, ""):
        words = "\n".join(seen)
        for expected in (
            "all_reduce",
            "barrier",
            "all_gather_object",
            "_functional_collectives.all_reduce",
            "torch.ops._c10d_functional",
            "ProcessGroup.allreduce",
            "Store.wait",
            "in beside",
        ):
            assert expected in words, (expected, words)
        assert "torch.distributed.send" in words or "torch.distributed.recv" in words


@pytest.mark.parametrize("mode", MODES)
def test_no_collective_between_the_call_of_save_and_durable(tmp_path: Path, mode: str) -> None:
    for found in run_ranks(4 if mode in ("hsdp", "fsdp_tp") else 2, collectives.saves, f"{tmp_path}/run", mode):
        assert found == {"save_now": {}, "step": {}, "wait": {}}
