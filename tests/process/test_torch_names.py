"""A torch that lacks names: a process of its own for each, as they are looked up when fastckpt is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

LACKS = """
import sys
import torch
{lacks}
import fastckpt
fastckpt.save({{"w": torch.ones(3)}}, sys.argv[1])
assert fastckpt.load(sys.argv[1])["w"].eq(1).all()
print("works")
"""


@pytest.mark.parametrize(
    "lacks",
    [
        "del torch.serialization._check_dill_version, torch.serialization._check_save_filelike",
        "del torch.serialization._check_seekable",
        "vars(torch.serialization).pop('_is_meta_location', None)",
    ],
)
def test_a_torch_without_names_that_can_be_done_without(lacks: str, tmp_path: Path) -> None:
    code = LACKS.format(lacks=lacks)
    # torch itself needs some of them, in calls that are not made here.
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f")], check=False, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout.strip()) == (0, "works"), done.stderr


def test_a_torch_without_a_name_that_is_needed_is_named() -> None:
    code = "import torch; del torch.serialization._get_restore_location; import fastckpt"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"ImportError: torch {torch.__version__} has no serialization._get_restore_location" in done.stderr
