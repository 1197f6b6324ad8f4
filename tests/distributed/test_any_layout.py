"""Saved under one layout and restored under another: every tensor, whole, is what was saved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed import programs
from tests.support.ranks import run_ranks

SAVED = [("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("tp", 2), ("fsdp_tp", 4), ("hsdp", 4)]
LOADED = [*SAVED, ("fsdp", 3)]


def runs(mode: str) -> bool:
    return programs.TRAINS_FSDP2 or mode not in programs.NEEDS_FSDP2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One run of each layout, two beside each other: half of a job's time is its beginning and end."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    urls = {f"{folder}/{mode}-{n}": (mode, n) for mode, n in SAVED if runs(mode)}
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run_ranks, n, programs.save_whole, url, mode) for url, (mode, n) in urls.items()]
        for call in calls:
            call.result()
    return [*urls]


@pytest.mark.parametrize(("mode", "n"), [one for one in LOADED if runs(one[0])])
def test_each_layout_from_each_other(saved: list[str], mode: str, n: int) -> None:
    """Seven restores by up to four processes: some 5 s, and as much for the saves before them."""
    for rank, wrong in enumerate(run_ranks(n, programs.load_wholes, saved, mode)):
        assert wrong == [[] for _ in saved], rank
