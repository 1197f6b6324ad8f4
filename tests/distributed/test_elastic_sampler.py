"""One order of samples, trained by 4 ranks, then 3, then 5, each going on from what the ones before have saved or left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastckpt.training.sample_order import SampleOrder
from tests.distributed import sampling
from tests.support.ranks import run_ranks


def joined(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The samples of each step, of all ranks in their order."""
    return [[sample for part in parts for sample in part] for parts in zip(*(r["samples"] for r in ranks), strict=True)]


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(a["model"].values(), b["model"].values(), strict=True))


def test_four_ranks_then_three_then_five(tmp_path: Path) -> None:
    """Steps 1–6 by four ranks with a Checkpointer; 7–9 by three, 10–16 by five, from states put in by hand: 12 processes, some 10 s.

    One process that trains all steps gets the same weights: uneven parts and stand-ins count as they should.
    """
    first = run_ranks(4, sampling.train, f"{tmp_path}/run", 6)
    saved = first[0]["state"]["sampler"]
    assert all(one["state"]["sampler"] == saved for one in first)
    second = run_ranks(3, sampling.train, None, 3, first[0]["state"])
    third = run_ranks(5, sampling.train, None, 7, second[0]["state"])
    steps = [step for ranks in (first, second, third) for step in joined(ranks)]
    orders = [SampleOrder(26, shuffle=True, seed=5, epoch=epoch).samples(0, 26) for epoch in range(4)]
    assert steps == [order[at : at + 8] for order in orders for at in range(0, 26, 8)]
    assert third[0]["state"]["sampler"] == {**saved, "epoch": 4, "samples": 0, "total": 104}
    assert alike(third[0]["state"], sampling.train(None, 16)["state"])
