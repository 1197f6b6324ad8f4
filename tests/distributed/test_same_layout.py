"""Saved and restored on as many ranks, under the same parallelism: every byte of every rank; training goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import programs
from tests.support.ranks import run_ranks

LAYOUTS = [
    ("plain", 2),
    ("ddp", 2),
    ("fsdp", 2),
    ("fsdp", 4),
    ("tp", 2),
    ("fsdp_tp", 4),
    ("hsdp", 4),
    ("pipeline", 2),
    ("experts", 2),
]


OFTEN = {("ddp", 2), ("fsdp_tp", 4), ("hsdp", 4), ("pipeline", 2), ("experts", 2)}
"""The others are slow: what they do, these do too, or test_any_layout.py."""


@pytest.mark.parametrize(
    ("mode", "n"),
    [
        pytest.param(mode, n, marks=() if (mode, n) in OFTEN else pytest.mark.slow)
        for mode, n in LAYOUTS
        if programs.TRAINS_FSDP2 or mode not in programs.NEEDS_FSDP2
    ],
)
def test_every_tensor_of_every_rank(tmp_path: Path, mode: str, n: int) -> None:
    """Saved at step 5 of 8; the second job begins with other weights. 2–4 processes, twice: some 10 s."""
    url = f"{tmp_path}/run"
    whole = run_ranks(n, programs.train, url, mode, 8, 5, 0)
    again = run_ranks(n, programs.train, url, mode, 8, 5, 99)
    assert [one["start"] for one in whole] == [0] * n
    assert [one["start"] for one in again] == [5] * n
    for rank, (first, second) in enumerate(zip(whole, again, strict=True)):
        assert first["tensors"].keys() == second["tensors"].keys()
        wrong = [name for name, tensor in first["tensors"].items() if not same(tensor, second["tensors"][name])]
        assert not wrong, (rank, wrong)
        assert same(first["rng"], second["rng"])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )
