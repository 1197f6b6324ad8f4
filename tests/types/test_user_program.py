"""A user's program type-checks (`make types`)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastckpt

PACKAGE = Path(fastckpt.__file__).parent
CONSUMER = """
    import fastckpt
    import torch

    model = torch.nn.Linear(2, 2)
    fastckpt.save(model.state_dict(), "x.fckpt")
    state: dict[str, torch.Tensor] = fastckpt.load("x.fckpt", map_location="cpu")
    with fastckpt.open("x.fckpt") as reader:
        weight: torch.Tensor = reader["weight"]
    fastckpt.save(state)  # type: ignore[call-arg]  # strict refuses an ignore that nothing needs
"""


def test_a_users_program_type_checks(tmp_path: Path) -> None:
    """Takes up to a minute at first: mypy reads all of torch. Later runs find it in the cache."""
    assert (PACKAGE / "py.typed").is_file()
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "consumer.py").write_text(textwrap.dedent(CONSUMER), encoding="utf-8")
    cache = PACKAGE.parent / ".mypy_cache" / "consumer"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        f"--cache-dir={cache}",
        "consumer.py",
    ]
    env = os.environ | {"MYPYPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
