"""Saves of which each changes little, somewhere else: the packs that a checkpoint names stay few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastckpt.store.memory import MemoryStore
from fastckpt.writing import delta_policy
from tests.support.delta_runs import OPTIONS, Run
from tests.support.repositories import check_all

MOST = 4


@pytest.mark.parametrize("threads", [1, 2])
def test_small_packs_are_given_up_one_after_the_other(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(delta_policy, "MOST_SMALL", MOST)
    generator = torch.Generator().manual_seed(1)
    state = {f"w{i}": torch.randn(270_000, generator=generator) for i in range(9)}
    options = replace(OPTIONS, threads=threads)
    run = Run(MemoryStore(), options)
    run.save(1, state)
    small, stored = [], []
    for step in range(2, 20):
        state[f"w{step % 9}"][step] += 1
        run.save(step, state)
        assert run.base is not None
        small.append(sum(file.n_bytes < 1 << 20 for file in run.base.files))
        stored.append(run.stored_bytes)
    if threads == 1:  # two fill packs as they come: both of their last ones may be small, or one
        assert small[:3] == [2, 3, 4], "the first save has a small one, too"
    assert max(small) < MOST + options.encoders, "those of the save itself come on top"
    assert max(stored) < 3 << 20, "one pack's chunks are written anew, or two's, not all"
    check_all(run.job.repository.store)
