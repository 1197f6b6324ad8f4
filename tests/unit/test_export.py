"""export: a committed rank becomes a file that is as good as one of fastckpt.save."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt.errors import CorruptCheckpointError, NoCheckpointError, StoreUnavailableError
from fastckpt.format import records
from fastckpt.host.files import AtomicFile
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.sources import PathSource
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.check.container import ContainerReport, check_container
from fastckpt.upkeep.export import export, lay_out
from fastckpt.writing.sinks import FileObject
from tests.support.readers import index_of
from tests.support.repositories import IN_PARALLEL, begin, commit_of, flip, keys_of, save_ranks, save_steps
from tests.support.states import rich_state, same


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def exported(store: LocalStore, step: int, out: Path, rank: int = 0, options: Options = IN_PARALLEL) -> int:
    return export(Repository(store), commit_of(store, step), rank, AtomicFile(str(out)), options)


def checked(path: Path) -> ContainerReport:
    source = PathSource(str(path))
    try:
        return check_container(source)
    finally:
        source.close()


def test_the_file_loads_bit_for_bit_and_passes_check(store: LocalStore, tmp_path: Path) -> None:
    save_steps(store, [1, 2])
    out = tmp_path / "out.fckpt"
    n_bytes = exported(store, 2, out)
    assert out.stat().st_size == n_bytes
    loaded = fastckpt.load(out, weights_only=False)
    assert same(loaded, rich_state(2))
    assert (
        loaded["model"]["view"].untyped_storage().data_ptr() == loaded["model"]["weight"].untyped_storage().data_ptr()
    )
    report = checked(out)
    assert report.ok, report.damage
    with fastckpt.open(out) as tensors:
        assert same(tensors["model.weight"], rich_state(2)["model"]["weight"])
        assert index_of(tensors).directory.step == 2
        assert index_of(tensors).directory.save is None


def test_nothing_is_decoded(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, [1])

    def no(*_: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("fastckpt.codec.decode", no)
        patch.setattr("fastckpt.codec.encode", no)
        exported(store, 1, tmp_path / "out.fckpt")
    assert same(fastckpt.load(tmp_path / "out.fckpt", weights_only=False), rich_state(1))


def test_several_ranks(store: LocalStore, tmp_path: Path) -> None:
    epoch = begin(store, 3).number
    save_ranks(store, epoch, 4, [rich_state(rank) for rank in range(3)])
    for rank in range(3):
        exported(store, 4, tmp_path / f"{rank}", rank)
        assert same(fastckpt.load(tmp_path / f"{rank}", weights_only=False), rich_state(rank))
        with fastckpt.open(tmp_path / f"{rank}") as tensors:
            assert (index_of(tensors).directory.rank, index_of(tensors).directory.world) == (rank, 3)
    with pytest.raises(NoCheckpointError, match="no rank 3"):
        exported(store, 4, tmp_path / "3", 3)
    assert not (tmp_path / "3").exists()


def test_many_packs_in_small_memory(store: LocalStore, tmp_path: Path) -> None:
    # Over a second: 48 MB of noise, so that reads are merged, split and run ahead.
    big = {str(i): torch.randn(1_500_000) for i in range(8)}
    epoch = begin(store, 1).number
    save_ranks(store, epoch, 1, [big])
    assert len(keys_of(store, "data/")) > 1
    done: list[tuple[int, int]] = []
    sink = AtomicFile(str(tmp_path / "out"))
    options = Options(threads=1, connections=4, host_budget_bytes=32 << 20)
    export(Repository(store), commit_of(store, 1), 0, sink, options, lambda *at: done.append(at))
    assert done[-1][0] == done[-1][1]
    assert same(fastckpt.load(tmp_path / "out"), big)


def test_empty_and_constant_states(store: LocalStore, tmp_path: Path) -> None:
    epoch = begin(store, 1).number
    states: list[Any] = [{}, {"z": torch.zeros(1000)}, 7]
    for step, obj in enumerate(states):
        save_ranks(store, epoch, step, [obj])
        exported(store, step, tmp_path / str(step))
        assert same(fastckpt.load(tmp_path / str(step)), obj)
        assert checked(tmp_path / str(step)).ok


def test_every_damaged_chunk_is_listed_and_the_target_stays(store: LocalStore, tmp_path: Path) -> None:
    save_steps(store, [1])
    out = tmp_path / "out"
    out.write_bytes(b"old")
    (pack,) = keys_of(store, "data/")
    n_bytes = store.head(pack).n_bytes
    flip(store, pack, 5)
    flip(store, pack, n_bytes - 5)
    with pytest.raises(CorruptCheckpointError, match="fastckpt salvage") as caught:
        exported(store, 1, out)
    assert len(caught.value.damage) == 2
    assert all(pack in item.place and item.tensors for item in caught.value.damage)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.glob(".out*")) == []


def test_a_short_pack_spares_the_chunks_before_its_end(store: LocalStore, tmp_path: Path) -> None:
    save_steps(store, [1])
    (pack,) = keys_of(store, "data/")
    store.put(pack, store.get(pack)[:-1])
    with pytest.raises(CorruptCheckpointError) as caught:
        exported(store, 1, tmp_path / "out")
    assert len(caught.value.damage) == 1


def test_missing_pack_and_missing_vote(store: LocalStore, tmp_path: Path) -> None:
    save_steps(store, [1])
    (pack,) = keys_of(store, "data/")
    store.delete(pack)
    with pytest.raises(CorruptCheckpointError) as caught:
        exported(store, 1, tmp_path / "out")
    assert {"model.weight", "array"} <= {name for item in caught.value.damage for name in item.tensors}
    (vote,) = keys_of(store, "votes/")
    store.delete(vote)
    with pytest.raises(CorruptCheckpointError, match="no such object"):
        exported(store, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_store_reaches_the_caller(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, [1])
    commit = commit_of(store, 1)

    def fail(*_: Any) -> None:
        raise StoreUnavailableError("as the test wants")

    monkeypatch.setattr(store, "get_into", fail)
    with pytest.raises(StoreUnavailableError):
        export(Repository(store), commit, 0, FileObject(io.BytesIO()), IN_PARALLEL)


def test_layout_stores_equal_chunks_once_and_tiles(store: LocalStore, tmp_path: Path) -> None:
    rows = np.zeros(5, records.LAYOUT)
    rows["transform"], rows["lane_bytes"], rows["raw_bytes"], rows["stored_bytes"] = 1, 1, 10, 10
    rows["file"], rows["offset"], rows["crc64nvme"] = [1, 2, 1, 1, 2], [0, 0, 10, 0, 50], [5, 5, 6, 5, 7]
    layout = lay_out(rows)
    assert layout.records["offset"].tolist() == [64, 64, 74, 64, 84]
    assert layout.records["file"].tolist() == [0] * 5
    assert layout.payload_bytes == 30
    assert [run[:3] for run in layout.runs] == [(1, 0, 20), (2, 50, 10)]
    assert records.check(layout.records, 64 + layout.payload_bytes) == []


def test_the_same_rank_gives_the_same_bytes(store: LocalStore, tmp_path: Path) -> None:
    save_steps(store, [1])
    exported(store, 1, tmp_path / "a")
    exported(store, 1, tmp_path / "b", options=Options(threads=1, connections=1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    source = PathSource(str(tmp_path / "a"))
    assert Reader.open(source, alone=True).footer.header.read_features == 1
    source.close()
