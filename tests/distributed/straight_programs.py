"""Ranks that restore straight into their tensors. Functions of this module are called in processes of their own (`tests.support.ranks`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.training.restorer import Loaded, Restorer
from tests.distributed.programs import Training, checkpointer
from tests.support.straight import all_straight


def restore(url: str, kind: str, asked: list[dict[str, Any]]) -> tuple[list[str], list[bool]]:
    """What restores come to, one after the other, and whether anything was read straight. And whether each has left what the second has."""
    said: list[str] = []
    left: list[dict[str, torch.Tensor]] = []
    n_straight = [0]
    fill = Restorer._fill

    def watched(self: Restorer, found: Loaded, *, states: bool = True) -> None:
        n_straight[0] = len(found.straight.rows)
        fill(self, found, states=states)

    with pytest.MonkeyPatch.context() as patch:
        all_straight(patch)
        patch.setattr(Restorer, "_fill", watched)
        training = Training(kind, seed=7)
        training.step(0)
        with checkpointer(url, training, every=None) as ckpt:
            for one in asked:
                n_straight[0] = 0
                before = training.tensors()
                try:
                    words = f"step {ckpt.restore(**one)}, {'some' if n_straight[0] else 'none'} straight"
                except fastckpt.CheckpointError as error:
                    same = all(torch.equal(before[name], tensor) for name, tensor in training.tensors().items())
                    words = f"{type(error).__name__}, {'unchanged' if same else 'changed'}: {error}"
                said.append(words)
                left.append(training.tensors())
            try:
                ckpt.save_now(9).wait()
                said.append("saved")
            except fastckpt.CheckpointError as error:
                said.append(type(error).__name__)
    second = left[1]
    return said, [all(torch.equal(second[name], one[name]) for name in second) for one in left]


def save_two(url: str, kind: str) -> None:
    """Steps 1 and 2."""
    training = Training(kind)
    with checkpointer(url, training, every=None) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            training.step(step)
            ckpt.save_now(step).wait()
