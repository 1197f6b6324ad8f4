"""What ranks store together, against one rank: votes counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import programs
from tests.support.ranks import run_ranks

SIZES = {"width": 1024, "hidden": 4096, "layers": 2}  # 16.8 M parameters: 201 MB with AdamW's moments


def stored_bytes(url: Path) -> int:
    return sum(
        path.stat().st_size
        for folder in ("data", "votes", "commits")
        for path in (url / folder).rglob("*")
        if path.is_file()
    )


def packs_by_rank(url: Path) -> list[int]:
    ranks = sorted((url / "data").glob("*/r*"))
    return [sum(path.stat().st_size for path in rank.iterdir()) for rank in ranks]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"] if programs.TRAINS_FSDP2 else ["ddp"])
def test_four_ranks_store_what_one_does(tmp_path: Path, mode: str) -> None:
    """200 MB of state on one rank and on four: 20 s."""
    run_ranks(1, programs.train, f"{tmp_path}/one", "plain", 2, 2, 0, SIZES)
    run_ranks(4, programs.train, f"{tmp_path}/four", mode, 2, 2, 0, SIZES)
    one, four = stored_bytes(tmp_path / "one"), stored_bytes(tmp_path / "four")
    shares = packs_by_rank(tmp_path / "four")
    print(f"{mode}: {four / one:.4f} of one rank's {one} bytes; ranks' packs {shares}")
    assert one > 100e6
    assert four <= 1.02 * one
    assert max(shares) <= 1.1 * min(shares)
