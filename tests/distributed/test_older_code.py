"""What an older fastckpt, from before there were many ranks, does with repositories of today: it reads them, or refuses them in words.

Each of its calls takes a second: a process of its own, without native kernels.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from tests.distributed import beginnings
from tests.support.forked import run_forked
from tests.support.ranks import run_ranks
from tests.support.torchrun import ROOT

OLD = "9ce8463e6690987c0d0609b67a706e2deb93a08a"
ITS_MODULES = """
import sys, warnings
tree = sys.argv.pop(1)
for name in [name for name in sys.modules if name.partition(".")[0] == "fastckpt"]:
    del sys.modules[name]  # the process comes with those of today
sys.path.insert(0, tree)
warnings.resetwarnings()  # a later torch may warn of what an older fastckpt does
import fastckpt
assert fastckpt.__file__.startswith(tree), fastckpt.__file__
"""
COMMAND = """
import runpy
runpy.run_module("fastckpt", run_name="__main__", alter_sys=True)
"""
VERBS = """
import json, sys, torch, fastckpt
verb, url = sys.argv[1:3]
class Plain:
    tensors = {}
    def state_dict(self): return dict(self.tensors)
    def load_state_dict(self, state): self.tensors = state
weights = Plain()
weights.tensors = {"weight": torch.zeros(3, 4), "half": torch.zeros(5, dtype=torch.bfloat16)}
try:
    with fastckpt.Checkpointer(url, {"weights": weights}, every=None, spot=None) as ckpt:
        step = ckpt.restore()
        if verb == "continue":
            weights.tensors["weight"] = weights.tensors["weight"] + 1
            ckpt.save_now(step + 1).wait()
        told = {"step": step, "sum": float(weights.tensors["weight"].double().sum())}
except fastckpt.CheckpointError as error:
    told = {"error": type(error).__name__, "words": str(error)}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree of the older version."""
    git = ["git", "-C", str(ROOT), "archive", OLD, "fastckpt"]
    try:
        archive = subprocess.run(git, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the older version is not in this checkout's history: {error}")
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    done = python(folder, "")
    if "cannot import name" in done.stderr:
        pytest.skip(f"the older version does not know this torch: {done.stderr.splitlines()[-1]}")
    return folder


def python(tree: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script with the fastckpt of a tree."""
    return run_forked(ITS_MODULES + script, str(tree), *arguments)


def does(tree: Path, verb: str, url: Path) -> dict[str, Any]:
    """Restore, or restore and save a step more, by the version in that tree: what came of it."""
    done = python(tree, VERBS, verb, str(url))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def command(tree: Path, *arguments: str) -> tuple[int, str]:
    """Its command line: exit status, and what it has said. No traceback: what goes wrong is told in words."""
    done = python(tree, COMMAND, *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_versions_take_turns_at_a_run_of_one_process(old: Path, tmp_path: Path) -> None:
    """Each restores what the other has saved, and goes on."""
    url = tmp_path / "run"
    for number, tree in enumerate((ROOT, old, ROOT, old)):
        assert does(tree, "continue", url) == {"step": number, "sum": 12.0 * (number + 1)}
    for tree in (old, ROOT):
        status, said = command(tree, "check", str(url))
        assert status == 0, said
    assert command(old, "restore", str(url), "--out", str(tmp_path / "one"))[0] == 0
    assert torch.equal(fastckpt.load(tmp_path / "one")["weights"]["weight"], torch.full((3, 4), 4.0))


def test_it_refuses_to_restore_a_part_of_many_ranks(old: Path, tmp_path: Path) -> None:
    """All else it does as ever: it has always read what other programs commit for several ranks."""
    url = tmp_path / "run"
    run_ranks(2, beginnings.save_twice, str(url), False)
    told = does(old, "restore", url)
    assert "error" in told, told
    assert "2 ranks" in told["words"], told
    status, said = command(old, "check", str(url))
    assert status == 0, said
    assert "epoch 1, step 2: ok" in said


def test_it_refuses_shares_by_words_and_harms_nothing(old: Path, tmp_path: Path) -> None:
    """None of its verbs takes them for damage, and its prune deletes no pack. Takes some 8 s: eight calls."""
    url = tmp_path / "run"
    run_ranks(2, beginnings.save_twice, str(url), True)
    assert "needs a newer fastckpt" in does(old, "continue", url)["words"]
    for verb in (
        ["check", "--repair", str(url)],
        ["show", str(url)],
        ["restore", str(url), "--out", str(tmp_path / "one")],
        ["salvage", str(url), "2", "--out", str(tmp_path / "saved")],
    ):
        status, said = command(old, *verb)
        assert status != 0, said
        assert "needs a newer fastckpt: it has read features 0x4" in said, said
    assert not (tmp_path / "one").exists()
    packs = sorted(url.rglob("*.pack"))
    status, said = command(old, "prune", str(url), "--keep-last", "1", "--run-is-stopped", "--yes")
    assert "no pack is deleted" in said
    assert sorted(url.rglob("*.pack")) == packs
    status, said = command(ROOT, "check", str(url))
    assert status == 0, said
    assert "epoch 1, step 2: ok" in said
