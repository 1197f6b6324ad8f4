"""Damage that one rank finds: all ranks refuse the checkpoint, or all fall back."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import programs
from tests.support.ranks import run_ranks


def damage(folder: Path, rank: int) -> None:
    (pack,) = (folder / "data").glob(f"*-000000000002-*/r{rank:05}/000000.pack")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)


def test_a_bit_in_one_ranks_pack(tmp_path: Path) -> None:
    url = f"{tmp_path}/run"
    run_ranks(2, programs.save_two, url)
    damage(Path(url), 1)
    for words in run_ranks(2, programs.restore_as, url, "latest"):
        assert words.startswith("CorruptCheckpointError, unchanged"), words
        assert "rank 1" in words
        assert "step 1" in words  # the newest complete one
    assert run_ranks(2, programs.restore_as, url, "latest-valid") == ["step 1", "step 1"]


def test_going_back_to_an_older_step(tmp_path: Path) -> None:
    """Steps that were saved before are due again, in an epoch of their own."""
    url = f"{tmp_path}/run"
    assert run_ranks(2, programs.go_back, url) == [[4, 2], [4, 2]]
    assert len(list((tmp_path / "run" / "commits").iterdir())) == 3
