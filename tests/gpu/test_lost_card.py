"""A card that is lost for good while a checkpoint is being saved: the save fails, the process ends, the checkpoint before it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu.suite.models import mlp
from tests.gpu.conftest import Record
from tests.gpu.lost_card import OPTIONS
from tests.gpu.tools import differences, kept_state

pytestmark = pytest.mark.gpu

# The same without us: it trains, pins memory, and loses the card.
PLAIN = """
import torch
pinned = torch.empty(1 << 20, pin_memory=True)
x = torch.ones(1 << 18, device="cuda")
pinned.view(torch.float32).copy_(x, non_blocking=True)
x[torch.tensor([1 << 30], device="cuda")]
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
"""


def test_a_card_that_is_lost_in_a_save(cuda: torch.device, tmp_path: Path, record: Record) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.lost_card", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    print(done.stdout, done.stderr[-3000:])
    said = json.loads(done.stdout.splitlines()[-1])
    plain = subprocess.run([sys.executable, "-c", PLAIN], check=False, capture_output=True, text=True, timeout=100)
    record(
        "a lost card",
        {
            **said,
            "exit status": done.returncode,
            "last words": done.stderr.strip().splitlines()[-3:],
            "exit status of a program without fastckpt": plain.returncode,
        },
    )
    assert said["save"] in said["SaveError"] or "save" in said["SaveError"]
    assert said["training"] in ("AcceleratorError", "RuntimeError")

    again = mlp(cuda)
    with Checkpointer(str(tmp_path / "run"), again.state, every=None, keep=None, spot=None, options=OPTIONS) as ckpt:
        assert ckpt.restore() == 1
        expected = torch.load(tmp_path / "expected.pt", map_location=cuda)
        assert not differences(expected, kept_state(again.state))
        again.step(2)
        ckpt.save_now(2).wait(60)
