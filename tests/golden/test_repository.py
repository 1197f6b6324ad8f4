"""A repository that version 1 wrote is read by fastckpt and by the clean-room decoder; and so is one written now."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.check.repository import check_repository
from tests.golden import make_repository
from tests.golden.repository_decoder import FormatError
from tests.golden.repository_decoder import Repository as Decoder
from tests.support.repositories import read
from tests.support.states import same

EXPECTED: dict[str, Any] = json.loads((make_repository.ROOT / "expected.json").read_text())


@pytest.fixture(params=["golden", "written now"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "run"
    if request.param == "golden":
        shutil.copytree(make_repository.ROOT / "run", root)
    else:
        make_repository.write(LocalStore(root))
    return root


def test_the_reference_decoder_reads_it(root: Path) -> None:
    found = Decoder(root)
    assert [list(c) for c in found.history()] == EXPECTED["history"]
    assert [list(c) for c in sorted(found.tombstones)] == EXPECTED["tombstones"]
    assert len(EXPECTED["commits"]) == len(found.commits)
    for entry in EXPECTED["commits"]:
        checkpoint = tuple(entry["checkpoint"])
        for rank, tensors in enumerate(entry["ranks"]):
            arrays = found.read(checkpoint, rank)
            digests = {json.dumps(name): hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
            assert digests == tensors, (checkpoint, rank)


def test_fastckpt_reads_it(root: Path) -> None:
    store = LocalStore(root)
    repository = Repository(store)
    assert [list(c) for c in Catalog(repository).history()] == EXPECTED["history"]
    seeds = {(1, 2): [2], (1, 3): [3], (2, 3): [13], (2, 4): [14], (3, 5): [20, 21], (3, 7): [24], (3, 8): [24]}
    for place, states in seeds.items():
        commit = repository.commit(CheckpointId(*place))
        assert isinstance(commit, Commit)
        assert commit.world == len(states)
        for rank, seed in enumerate(states):
            assert same(read(store, commit, rank), make_repository.state(seed))
    report = check_repository(repository)
    assert report.ok, report.findings
    assert [(one.save.step, one.state) for one in report.unfinished] == [(6, "incomplete")]
    assert len(report.pins) == 2, "a member that this version does not know is no damage"


def read_all(root: Path) -> None:
    found = Decoder(root)
    for checkpoint, commit in found.commits.items():
        for rank in range(commit["world"]):
            found.read(checkpoint, rank)


def test_the_decoder_verifies(root: Path) -> None:
    for pattern in ("votes/*/*", "data/*/*/*", "commits/*", "epochs/*"):
        for path in sorted(root.glob(pattern)):
            if "/data/000001-000000000001-" in str(path) or "-000000000006-" in str(path):
                continue  # retired, and never committed: nobody reads these
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 4
            path.write_bytes(data)
            with pytest.raises(FormatError):
                read_all(root)
            data[len(data) // 3] ^= 4
            path.write_bytes(data)
    read_all(root)
