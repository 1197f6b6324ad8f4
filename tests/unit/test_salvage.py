"""salvage: what verifies is written, what does not is named, with where else it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt.errors import NoCheckpointError, StoreUnavailableError, TooLargeError
from fastckpt.format.keys import CheckpointId, SaveId, VoteName, commit_key
from fastckpt.host.files import AtomicFile
from fastckpt.options import Options
from fastckpt.reading.sources import PathSource
from fastckpt.reading.tensor_reader import TensorReader
from fastckpt.repository.commit import try_commit
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.state.sealing import seal
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.check.container import check_container
from fastckpt.upkeep.salvage import FoundIn, SalvageReport, choose_try, salvage
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload
from tests.support.repositories import IN_PARALLEL, OPTIONS, begin, flip, keys_of, save_ranks, save_steps, vote
from tests.support.states import captured, rich_state, same, sealed

NAMES = [
    "array",
    "empty",
    "ids",
    "model.bias",
    "model.view",
    "model.weight",
    "optim.state.0.exp_avg",
    "optim.state.0.step",
    "wide",
]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(store: LocalStore, step: int, out: Path, epoch: int = 1, **more: Any) -> SalvageReport:
    more.setdefault("options", IN_PARALLEL)
    return salvage(Repository(store), CheckpointId(epoch, step), str(out), **more)


def flat(obj: Any, name: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in obj.items():
        if isinstance(value, dict):
            found |= flat(value, (*name, str(key)))
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            found[".".join((*name, str(key)))] = value
    return found


def loaded(out: Path, rank: int = 0) -> dict[str, Any]:
    path = out / f"rank-{rank:05}.fckpt"
    source = PathSource(str(path))
    assert check_container(source).ok
    source.close()
    found: dict[str, Any] = fastckpt.load(path, weights_only=False)
    return found


def lost_names(report: SalvageReport) -> list[str]:
    return sorted(".".join(map(str, tensor.name)) for _, tensor in report.lost)


def test_everything_of_a_whole_checkpoint(store: LocalStore, out: Path) -> None:
    save_steps(store, [1])
    seen: list[tuple[int, int]] = []
    report = run(store, 1, out, progress=lambda done, total: seen.append((done, total)))
    assert report.nothing_lost
    assert sorted(report.ranks[0].saved) == NAMES
    expected = flat(rich_state(1))
    found = loaded(out)
    assert sorted(found) == NAMES
    assert all(same(found[name], expected[name]) for name in NAMES)
    assert found["model.view"].untyped_storage().data_ptr() == found["model.weight"].untyped_storage().data_ptr()
    assert seen[-1][0] == seen[-1][1]
    text = json.loads((out / "report.json").read_text())
    assert text["schema"] == "fastckpt.salvage/1"
    assert text["nothing_lost"] is True
    assert text["ranks"][0]["file"] == "rank-00000.fckpt"


def test_a_damaged_chunk_costs_its_tensors_and_names_where_they_are(store: LocalStore, out: Path) -> None:
    save_steps(store, [1, 2, 3])
    (pack,) = keys_of(store, "data/000001-000000000003-000/")
    flip(store, pack, store.head(pack).n_bytes // 2)
    report = run(store, 3, out)
    lost = lost_names(report)
    assert lost == ["model.view", "model.weight"]
    assert all(tensor.found_in == FoundIn(CheckpointId(1, 2), 0) for _, tensor in report.lost)
    assert "crc64nvme" in report.lost[0][1].why[0]
    found, expected = loaded(out), flat(rich_state(3))
    assert sorted(found) == [name for name in NAMES if name not in lost]
    assert all(same(found[name], expected[name]) for name in found)
    text = json.loads((out / "report.json").read_text())
    assert text["ranks"][0]["lost"][0]["found_in"] == {"epoch": 1, "step": 2, "rank": 0}
    assert report.ranks[0].object_whole


def test_where_else_is_verified_too(store: LocalStore, out: Path) -> None:
    save_steps(store, [1, 2, 3])
    for step in (2, 3):
        (pack,) = keys_of(store, f"data/000001-{step:012}-000/")
        flip(store, pack, store.head(pack).n_bytes // 2)
    report = run(store, 3, out)
    assert {tensor.found_in for _, tensor in report.lost} == {FoundIn(CheckpointId(1, 1), 0)}


def test_history_goes_before_abandoned_branches(store: LocalStore, out: Path) -> None:
    save_steps(store, [1, 5])
    from fastckpt.repository.incarnation import Incarnation

    job = Incarnation(Repository(store), IN_PARALLEL)
    job.choose_and_claim(1)
    job.save(sealed(rich_state(3)), 3)
    (pack,) = keys_of(store, "data/000002-000000000003-000/")
    store.delete(pack)
    report = run(store, 3, out, epoch=2)
    weight = next(tensor for _, tensor in report.lost if tensor.name[-1] == "weight")
    assert weight.found_in == FoundIn(CheckpointId(1, 1), 0)


def test_other_shapes_and_types_are_no_substitute(store: LocalStore, out: Path) -> None:
    epoch = begin(store, 1).number
    save_ranks(store, epoch, 1, [{"a": torch.randn(40), "b": torch.randn(40)}])
    save_ranks(store, epoch, 2, [{"a": torch.randn(41), "b": torch.randn(40).double()}])
    save_ranks(store, epoch, 3, [{"a": torch.randn(40), "b": torch.randn(40)}])
    store.delete(keys_of(store, "data/000001-000000000003-000/")[0])
    report = run(store, 3, out)
    assert [tensor.found_in for _, tensor in report.lost] == [FoundIn(CheckpointId(1, 1), 0)] * 2


def test_missing_packs(store: LocalStore, out: Path) -> None:
    save_steps(store, [1])
    store.delete(keys_of(store, "data/")[0])
    report = run(store, 1, out)
    constant = ("empty", "optim.state.0.exp_avg", "optim.state.0.step")  # these need no pack
    assert lost_names(report) == [name for name in NAMES if name not in constant]
    assert "does not exist" in report.lost[0][1].why[0]
    assert all(tensor.found_in is None for _, tensor in report.lost)
    assert same(loaded(out)["optim.state.0.exp_avg"], torch.zeros(300_000))


def test_a_rank_whose_vote_is_lost(store: LocalStore, out: Path) -> None:
    epoch = begin(store, 3).number
    for step in (1, 2):
        save_ranks(store, epoch, step, [rich_state(10 * step + rank) for rank in range(3)])
    votes = keys_of(store, "votes/000001-000000000002-000/")
    store.delete(votes[1])
    flip(store, votes[2], 200)  # in the directory: nothing of it can be believed
    report = run(store, 2, out)
    assert [rank.lost_whole for rank in report.ranks] == [False, True, True]
    assert report.ranks[1].file is None
    assert "missing" in report.ranks[1].notes[0]
    assert "damaged" in report.ranks[2].notes[0]
    lost = report.ranks[1].lost
    assert len(lost) == len(NAMES)
    assert all(tensor.assumed and tensor.found_in == FoundIn(CheckpointId(1, 1), 1) for tensor in lost)
    assert same(loaded(out)["model.weight"], rich_state(20)["model"]["weight"])


def test_a_vote_with_a_damaged_skeleton_keeps_its_tensors(store: LocalStore, out: Path) -> None:
    save_steps(store, [1])
    (key,) = keys_of(store, "votes/")
    flip(store, key, store.head(key).n_bytes - 256 - 5)
    report = run(store, 1, out)
    assert not report.nothing_lost
    assert not report.ranks[0].object_whole
    assert report.lost == []
    expected, found = flat(rich_state(1)), loaded(out)
    assert all(same(found[name], expected[name]) for name in NAMES)


def test_a_vote_with_a_damaged_header_keeps_its_tensors(store: LocalStore, out: Path) -> None:
    save_steps(store, [1])
    flip(store, keys_of(store, "votes/")[0], 3)
    assert sorted(run(store, 1, out).ranks[0].saved) == NAMES


@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_or_lost_commit_record(store: LocalStore, out: Path, gone: bool) -> None:
    epoch = begin(store, 2).number
    save_ranks(store, epoch, 1, [rich_state(1), rich_state(2)])
    key = commit_key(CheckpointId(epoch, 1))
    if gone:
        store.delete(key)
    else:
        flip(store, key)
    report = run(store, 1, out)
    assert report.commit.startswith("missing" if gone else "commit or tombstone")
    assert report.nothing_lost
    for rank in range(2):
        assert same(loaded(out, rank)["model.weight"], rich_state(rank + 1)["model"]["weight"])


def test_an_unfinished_save(store: LocalStore, out: Path) -> None:
    epoch = begin(store, 2).number
    vote(store, epoch, 7, 1, 2, rich_state(7))
    report = run(store, 7, out)
    assert [rank.lost_whole for rank in report.ranks] == [True, False]
    assert "has not voted" in report.ranks[0].notes[0]
    assert same(loaded(out, 1)["ids"], rich_state(7)["ids"])


def test_one_rank_only(store: LocalStore, out: Path) -> None:
    save_ranks(store, begin(store, 2).number, 1, [rich_state(1), rich_state(2)])
    report = run(store, 1, out, ranks=[1])
    assert [rank.rank for rank in report.ranks] == [1]
    assert not (out / "rank-00000.fckpt").exists()
    with pytest.raises(NoCheckpointError, match="ranks 0 to 1"):
        run(store, 1, out, ranks=[2])


def test_nothing_and_retired(store: LocalStore, out: Path) -> None:
    job = save_steps(store, [1, 2])
    with pytest.raises(NoCheckpointError, match="nothing is left"):
        run(store, 9, out)
    job.retain(Keep(last=1))
    with pytest.raises(NoCheckpointError, match="retired"):
        run(store, 1, out)
    assert not out.exists()


def test_odd_tensors(store: LocalStore, out: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    obj = {
        1: torch.tensor([1.0]),
        "1": torch.tensor([2.0]),  # the same dotted name
        "t": base.t()[1:3],
        "stride0": torch.tensor([5.0]).expand(9),
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "bf16": torch.randn(100).bfloat16(),
        "complex": torch.randn(10, dtype=torch.complex64),
        "f8": torch.randn(16).to(torch.float8_e4m3fn),
        "meta": torch.empty(3, device="meta"),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "big-array": np.asfortranarray(np.random.default_rng(0).normal(size=(400, 500))),
        "nan": torch.tensor([float("nan"), -0.0]),
        "": torch.tensor([9.0]),
    }
    save_ranks(store, begin(store, 1).number, 1, [obj])
    report = run(store, 1, out)
    assert report.nothing_lost, report.lost
    found = loaded(out)
    assert float(found["1"]) == 1.0
    assert float(found["1#2"]) == 2.0
    for name, value in obj.items():
        if name not in (1, "1", "meta", "parameter", ""):
            assert same(found[str(name)], value), name
    assert same(found["parameter"], obj["parameter"].data)  # type: ignore[attr-defined]
    assert found["big-array"].flags.f_contiguous


def test_arrays_of_the_other_byte_order_are_salvaged_with_their_bytes(store: LocalStore, out: Path) -> None:
    """Our writer pickles them, but the format allows them as storages. When they are written anew they are pickled."""
    expected = np.arange(200_000, dtype=">f8")
    epoch = begin(store, 1).number
    obj = captured({"array": expected.view("<f8")})
    obj.storages[0].dtype = "numpy:>f8"
    obj.tensors[0] = obj.tensors[0]._replace(dtype="numpy:>f8")
    save = SaveId(epoch, 1, 0)
    upload(seal(obj), store, SaveRequest(asked=SaveAsked(1), save=save, parent=None, rank=0, world=1), OPTIONS)
    assert try_commit(store, save)
    report = run(store, 1, out)
    assert report.nothing_lost
    assert np.array_equal(loaded(out)["array"], expected)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*:UserWarning")
def test_quantized_tensors_are_named_as_lost(store: LocalStore, out: Path) -> None:
    obj = {"q": torch.quantize_per_tensor(torch.randn(10), 0.1, 0, torch.qint8), "a": torch.ones(3)}
    save_ranks(store, begin(store, 1).number, 1, [obj])
    report = run(store, 1, out)
    assert lost_names(report) == ["q"]
    assert "scales" in report.lost[0][1].why[0]
    assert list(loaded(out)) == ["a"]


def test_memory_stays_small(store: LocalStore, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 s: 160 MB of noise; 64 MiB of chunks are kept, 32 MiB are on their way.
    obj = {str(i): torch.randn(1 << 20) for i in range(40)}
    save_ranks(store, begin(store, 1).number, 1, [obj])
    most, write = 0, AtomicFile.write

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, resident())

    def looking(self: AtomicFile, data: Any) -> None:
        look()
        write(self, data)

    monkeypatch.setattr(AtomicFile, "write", looking)
    before = resident()
    report = run(store, 1, out, progress=look, options=Options(threads=1))
    assert report.nothing_lost
    assert most - before < 130 << 20
    with fastckpt.open(out / "rank-00000.fckpt") as tensors:
        assert same(tensors["7"], obj["7"])


def test_a_limit_holds(store: LocalStore, out: Path) -> None:
    save_steps(store, [1])
    with pytest.raises(TooLargeError, match="FASTCKPT_MAX_LOAD_BYTES"):
        run(store, 1, out, options=Options(threads=1, max_load_bytes=1000))


def test_a_store_that_does_not_answer_is_no_damage(
    store: LocalStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(store, [1])

    def fail(*_: Any) -> None:
        raise StoreUnavailableError("as the test wants")

    monkeypatch.setattr(store, "get_into", fail)
    with pytest.raises(StoreUnavailableError):
        run(store, 1, out)
    assert not (out / "report.json").exists()


def test_the_repository_stays_as_it_was(store: LocalStore, out: Path) -> None:
    save_steps(store, [1, 2])
    flip(store, keys_of(store, "data/")[1])
    before = list(store.list(""))
    run(store, 2, out)
    assert list(store.list("")) == before


def test_the_try_that_is_believed() -> None:
    def name(attempt: int, rank: int, world: int = 2) -> VoteName:
        return VoteName(SaveId(1, 2, attempt), rank, world, 5, "0" * 32)

    assert choose_try([], "") is None
    complete = choose_try([name(0, 0), name(1, 0), name(1, 1), name(2, 0), name(2, 1)], "")
    assert complete is not None
    assert complete.save.attempt == 1
    most = choose_try([name(0, 0, 3), name(1, 0, 3), name(1, 2, 3)], "")
    assert most is not None
    assert (most.save.attempt, most.world, sorted(most.names)) == (1, 3, [0, 2])


def test_fetching_by_name_agrees(store: LocalStore, out: Path) -> None:
    save_steps(store, [1])
    run(store, 1, out)
    with fastckpt.open(out / "rank-00000.fckpt") as tensors:
        assert isinstance(tensors, TensorReader)
        assert same(tensors["model.weight"], rich_state(1)["model"]["weight"])
