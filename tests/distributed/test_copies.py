"""Two ranks go on from a mirrored copy, which they read through a prefetched folder: the same bytes as a restart at the origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastckpt.errors import RepositoryError
from fastckpt.format import keys
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.mirror.mirror import mirror
from fastckpt.upkeep.prefetch import prefetch
from tests.distributed import programs
from tests.support.ranks import run_ranks
from tests.support.repositories import keys_of


def test_ranks_go_on_from_a_copy_through_a_folder(tmp_path: Path) -> None:
    """Saved at step 5 of 8; 2 processes, twice: some 10 s. The copy's packs are spoilt before the second start, so it can only have
    restored what lies in the folder.
    """
    origin, copy, folder = LocalStore(tmp_path / "run"), LocalStore(tmp_path / "copy"), tmp_path / "cache"
    whole = run_ranks(2, programs.train, f"{tmp_path}/run", "ddp", 8, 5, 0)
    mirror(origin, copy)
    prefetch(copy, str(folder))
    for key in keys_of(copy, keys.DATA):
        copy.put(key, bytes(copy.head(key).n_bytes))
    again = run_ranks(2, programs.train, f"{tmp_path}/copy", "ddp", 8, 5, 99, None, str(folder))
    assert [one["start"] for one in again] == [5, 5]
    for first, second in zip(whole, again, strict=True):
        assert first["tensors"].keys() == second["tensors"].keys()
        assert all(programs.same(tensor, second["tensors"][name]) for name, tensor in first["tensors"].items())
        assert torch.equal(first["rng"], second["rng"])
    with pytest.raises(RepositoryError, match="gone on"):
        mirror(origin, copy)
