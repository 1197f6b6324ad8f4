"""torch.distributed.checkpoint over fastckpt, with a state on a device whose work is still under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastckpt.dcp import FastckptReader
from tests.support.dcp import IGNORED, load, save

pytestmark = pytest.mark.filterwarnings(IGNORED)


def test_a_state_on_a_device(gpu: torch.device, tmp_path: Path) -> None:
    base = torch.arange(300_000, dtype=torch.float32)
    weight = base.to(gpu)
    stream = torch.Stream(gpu)
    before = torch.accelerator.current_stream()
    stream.wait_stream(before)
    torch.accelerator.set_stream(stream)
    try:
        for _ in range(3):
            weight = weight * 2  # still under way, in another stream than that of other threads, when the save begins
    finally:
        torch.accelerator.set_stream(before)
    state: dict[str, Any] = {"w": weight, "tied": weight, "row": weight[10:20], "host": base, "n": 1}
    save(tmp_path, state)
    found = FastckptReader(tmp_path).read_state_dict()
    assert torch.equal(found["w"], base * 8)
    assert torch.equal(found["row"], base[10:20] * 8)
    target: dict[str, Any] = {"w": torch.zeros_like(weight), "row": torch.zeros(10, device=gpu)}
    load(tmp_path, target)
    assert torch.equal(target["w"].cpu(), base * 8)
    assert torch.equal(target["row"].cpu(), base[10:20] * 8)
