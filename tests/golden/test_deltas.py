"""Checkpoints with deltas: those that version 1 wrote, and those written now, are read by fastckpt and by the clean-room decoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit
from fastckpt.kernels.transform import Transform
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from tests.golden import make_deltas, repository_decoder
from tests.golden.make_deltas import STEPS, WORLD
from tests.golden.repository_decoder import Repository as Decoder
from tests.support.chains import world
from tests.support.deltas import chain_state
from tests.support.repositories import read
from tests.support.states import same

EXPECTED: dict[str, list[dict[str, str]]] = json.loads((make_deltas.ROOT / "expected.json").read_text())


@pytest.fixture(params=["golden", "written now"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "golden":
        return make_deltas.ROOT / "run"
    make_deltas.write(LocalStore(tmp_path / "run"))
    return tmp_path / "run"


def test_both_readers_read_it(root: Path) -> None:
    found, repository = Decoder(root), Repository(LocalStore(root))
    transforms: set[int] = set()
    for step in range(1, STEPS + 1):
        assert make_deltas.digests(found, step) == EXPECTED[str(step)]
        commit = repository.commit(CheckpointId(1, step))
        assert isinstance(commit, Commit)
        for rank in range(WORLD):
            assert same(read(repository.store, commit, rank), chain_state(step + 100 * rank))
            reader = open_vote(repository.store, commit.vote(rank))
            transforms |= set(reader.records["transform"].tolist())
            if step > 2:
                assert len({file.key.split("/")[1] for file in reader.files}) > 1, "no pack of an earlier save"
    assert transforms >= {Transform.ROT, Transform.SUBPACK, Transform.CAST}


@pytest.mark.parametrize("seed", range(12))
def test_the_reference_decoder_reads_any_chain(seed: int, tmp_path: Path) -> None:
    """Bases in two rows, of several chunks, and of bases; frames of libzstd and of our own."""
    rows, storages = world(seed, depth=3, most_bytes=6_000)
    store = LocalStore(tmp_path)
    rows.vote(store, storages)
    vote = repository_decoder.open_vote(tmp_path, rows.index(store, storages))
    assert vote.raw == np.concatenate(rows.raws).tobytes()
