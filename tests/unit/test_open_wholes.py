"""A checkpoint of many ranks is opened and loaded by one process: every DTensor whole, what each rank had for itself by name."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastckpt
from fastckpt import Checkpointer
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    NotACheckpointError,
    RestoreError,
    UnknownTensorError,
)
from fastckpt.format import keys
from fastckpt.format.keys import vote_key
from fastckpt.options import Options
from fastckpt.reading.contents import OfContainer
from fastckpt.reading.tensor_reader import TensorReader
from fastckpt.reading.whole_contents import WholeContents
from fastckpt.reading.whole_objects import load_checkpoint
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.state import Captured
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.repositories import commit_of, flip, keys_of
from tests.support.states import same
from tests.support.wholes import as_boxes, captured_parts, module, part_of, save_parts

OPTIONS = Options(threads=1, connections=2)
WORLD = 4
W, V = (320, 200), (31, 6)
HALF = {"model.both": [(0, 20), (2, 20)]}, {"model.both": [(1, 20), (3, 20)]}


def wholes(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randn(W, generator=generator),
        "columns": torch.randn(W, generator=generator).bfloat16(),
        "grid": torch.randn(V, generator=generator),
        "both": torch.randn(10, 2, generator=generator),
    }


GRIDS = {"rows": (4, 1), "columns": (1, 4), "grid": (2, 2)}


def state_of(rank: int) -> Captured:
    """Of four ranks: parts of three tensors, one that two and two hold in halves, and plain things."""
    places: dict[str, Any] = {}
    model = module()
    for name, whole in wholes().items():
        grid, number = (GRIDS[name], rank) if name in GRIDS else ((2, 1), rank % 2)
        part, offset = part_of(whole, grid, number)
        model[name] = torch.nn.Parameter(part) if name == "rows" else part
        places[f"model.{name}"] = whole.shape, offset
    model["tied"] = model["rows"]
    places["model.tied"] = places["model.rows"]
    model["alike"] = torch.arange(5.0)
    if rank:
        model[f"layer{rank}"] = torch.full((3,), float(rank))
    strided = torch.arange(12.0).reshape(3, 4)
    state = {
        "model": model,
        "optim": {"step": torch.tensor(7.0), "lr": 0.1},
        "views": [strided, strided.t()[1:]],
        "mine": {"t": torch.full((4,), float(rank)), "a": np.full(9_000, rank), "words": f"rank {rank}"},
    }
    return captured_parts(state, places, rank, shares=HALF[rank % 2])


@pytest.fixture(scope="module")
def saved() -> MemoryStore:
    store = MemoryStore()
    save_parts(store, [state_of(rank) for rank in range(WORLD)])
    return store


@pytest.fixture
def store(saved: MemoryStore) -> MemoryStore:
    copied = MemoryStore()
    for info in saved.list(""):
        copied.put(info.key, saved.get(info.key))
    return copied


@pytest.fixture
def url(store: MemoryStore, tmp_path: Path) -> str:
    folder = LocalStore(tmp_path / "run")
    for info in store.list(""):
        folder.put(info.key, store.get(info.key))
    return str(tmp_path / "run")


def opened(store: Store) -> TensorReader:
    return TensorReader(WholeContents(SavedRanks(store, commit_of(store, 1)), OPTIONS, "here"))


def loaded(store: Store, **how: Any) -> Any:
    how = {"map_location": None, "pickle_module": pickle, "weights_only": False, "load_args": {}, **how}
    return load_checkpoint(SavedRanks(store, commit_of(store, 1)), "here", OPTIONS, **how)


def test_tensors_are_whole_in_any_order(url: str) -> None:
    names = [f"model.{name}" for name in wholes()]
    with fastckpt.open(url) as reader:
        for name in random.Random(3).sample(names, len(names)):
            assert same(reader[name], wholes()[name.removeprefix("model.")])
        assert reader.entry("model.rows").shape == W
        assert same(reader["model.layer2"], torch.full((3,), 2.0))
        assert reader["views.1"].stride() == (1, 4)
        assert reader["views.0"].untyped_storage().nbytes() == 48
        views = reader["views.0"], reader["views.1"]
        assert views[0].data_ptr() + 4 == views[1].data_ptr(), "they share memory, as in a file"
        tied = reader["model.rows"], reader["model.tied"]
        assert tied[0].data_ptr() == tied[1].data_ptr()
        assert reader.summary["tensors"] == len(reader) + len(reader.of_each_rank)


def test_what_each_rank_had_for_itself_is_named(url: str) -> None:
    with fastckpt.open(url) as reader:
        assert reader.of_each_rank == {"mine.t": (0, 1, 2, 3), "mine.a": (0, 1, 2, 3)}
        assert "mine.t" not in reader
        assert "model.alike" in reader
        assert not {"mine.t", "mine.a"} & set(reader)
        assert {"optim.step", "model.alike", "views.0"} <= set(reader)
        assert all(name in reader and reader[name] is not None for name in reader)
        with pytest.raises(UnknownTensorError, match=r"ranks 0, 1, 2, 3 had each its own.*rank=0"):
            reader["mine.t"]
        with pytest.raises(UnknownTensorError, match="rank=0"):
            reader["mine", "t"]
    with fastckpt.open(url, rank=2) as reader:
        assert same(reader["mine.t"], torch.full((4,), 2.0))
        assert reader["model.rows"].shape == (80, 200)
        assert reader.of_each_rank == {}
    with pytest.raises(NoCheckpointError, match="ranks 0 to 3: there is no rank 4"):
        fastckpt.open(url, rank=4)
    with pytest.raises(NoCheckpointError, match="no checkpoint of step 9"):
        fastckpt.open(url, step=9, rank=1)


def test_a_file_has_no_ranks(tmp_path: Path) -> None:
    fastckpt.save({"a": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(NotACheckpointError, match=r"no checkpoint of rank 0\. Leave step and rank out"):
        fastckpt.open(tmp_path / "x", rank=0)


def test_load_gives_the_objects_of_rank_0_with_whole_tensors(url: str, caplog: pytest.LogCaptureFixture) -> None:
    found = fastckpt.load(url, weights_only=False)
    model = found["model"]
    assert all(same(model[name].detach(), whole) for name, whole in wholes().items())
    assert type(model["rows"]) is torch.nn.Parameter
    assert model["rows"] is model["tied"]
    assert [model[f"layer{rank}"].tolist() for rank in (1, 2, 3)] == [[float(rank)] * 3 for rank in (1, 2, 3)]
    assert found["mine"]["words"] == "rank 0"
    assert same(found["mine"]["a"], np.full(9_000, 0))
    assert found["views"][0].data_ptr() + 4 == found["views"][1].data_ptr()
    warned = [record for record in caplog.records if record.name == "fastckpt"]
    assert len(warned) == 1
    assert "each rank had its own mine.a, mine.t, mine.words, of which that of rank 0 was loaded" in warned[0].message


def test_map_location_and_weights_only_keep_their_meaning(url: str) -> None:
    found = fastckpt.load(url, map_location="meta", weights_only=False)
    assert found["model"]["rows"].is_meta
    assert found["model"]["rows"].shape == W
    moved: list[int] = []
    fastckpt.load(url, map_location=lambda storage, _: moved.append(storage.nbytes()), weights_only=False)
    assert 320 * 200 * 4 in moved
    with pytest.raises(Exception, match="Weights only load failed"):
        fastckpt.load(url)  # a NumPy array is in it
    with pytest.raises(ValueError, match="mmap"):
        fastckpt.load(url, mmap=True)


def test_a_default_device_changes_nothing(url: str) -> None:
    with torch.device("meta"):
        found = fastckpt.load(url, weights_only=False)
        with fastckpt.open(url) as reader:
            columns = reader["model.columns"]
        state = {"model": {"grid": torch.zeros(V, device="cpu")}}
        with fastckpt.open(url) as reader:
            reader.load_into(state)
    assert same(columns, wholes()["columns"])
    assert same(state["model"]["grid"], wholes()["grid"])
    assert all(same(found["model"][name].detach(), whole) for name, whole in wholes().items())


def test_a_fake_mode_is_refused(url: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(RestoreError, match="cannot be loaded under a FakeTensorMode"):
        fastckpt.load(url, weights_only=False)


class Counting(Wrapper):
    """Counts the bytes of packs, and the requests for votes."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.n_bytes = 0
        self.votes: Counter[int] = Counter()
        """Requests for the vote of each rank."""

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        name = keys.parse_vote(key)
        if name is not None:
            self.votes[name.rank] += 1
        return operation()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        super().get_into(key, offset, out)
        self.n_bytes += memoryview(out).nbytes if key.startswith(keys.DATA) else 0


def test_only_what_is_needed_is_read(store: MemoryStore) -> None:
    counting = Counting(store)
    commit = commit_of(store, 1)
    reader = TensorReader(WholeContents(SavedRanks(counting, commit), OPTIONS, "here"))
    assert counting.n_bytes == 0
    assert counting.votes == dict.fromkeys(range(WORLD), 2), "footer and directory"
    counting.votes.clear()
    assert reader["model.layer2"].shape == (3,)
    assert set(counting.votes) == {2}
    assert reader["model.grid"].shape == V
    # Small tensors of one type lie in one chunk of each rank.
    assert counting.n_bytes < 4_000
    before = counting.n_bytes
    assert reader["model.columns"].shape == W
    assert counting.n_bytes - before <= 320 * 200 * 2 + 4096
    assert reader["model.alike"].tolist() == [0, 1, 2, 3, 4]
    assert counting.n_bytes < commit.stored_bytes / 2


def test_ranks_with_different_tensors_of_one_name_have_no_whole() -> None:
    """As optimizers of pipeline stages number their parameters: each stage begins at 0."""
    store = MemoryStore()
    same_shape, other_shape, mixed = ("optim", "a"), ("optim", "b"), ("optim", "c")
    states = []
    for rank in range(WORLD):
        stage, half = divmod(rank, 2)
        b = torch.ones(2 + stage, 2)
        c = torch.ones(3) if stage else torch.ones(2, 2)
        state = {"optim": {"a": torch.full((2, 3), float(stage)), "b": b, "c": c}, "n": torch.ones(1)}
        places: dict[str, Any] = {
            "optim.a": ((4, 3), (2 * half, 0)),
            "optim.b": ((4 + 2 * stage, 2), (half * len(b), 0)),
        }
        places |= {} if stage else {"optim.c": ((4, 2), (2 * half, 0))}
        states.append(captured_parts(state, places, rank))
    save_parts(store, states)
    with opened(store) as reader:
        assert set(reader.of_each_rank) == {"optim.a", "optim.b", "optim.c"}
        for name in (same_shape, other_shape, mixed):
            with pytest.raises(UnknownTensorError, match="had each its own"):
                reader[name]
        assert reader["n"].item() == 1
    with pytest.raises(RestoreError, match=r"optim\.a, optim\.b, optim\.c ranks had parts of different tensors"):
        loaded(store)


def test_a_restore_does_not_mix_different_tensors_of_one_name() -> None:
    for differs in (False, True):
        store, live = MemoryStore(), {"d": {"a": torch.zeros(4, 3)}}
        states = []
        for rank in range(WORLD):
            stage, half = divmod(rank, 2)
            part = torch.full((2, 3), float(half + 10 * stage * differs))
            states.append(captured_parts({"d": {"a": part}}, {"d.a": ((4, 3), (2 * half, 0))}, rank))
        save_parts(store, states)
        with Checkpointer(store, live, every=None, spot=None, read_only=True) as ckpt:
            if differs:
                with pytest.raises(RestoreError, match=r"of d\.a ranks had parts of different tensors"):
                    ckpt.restore()
                assert not live["d"]["a"].any()
            else:
                assert ckpt.restore() == 1
                assert live["d"]["a"][:, 0].tolist() == [0, 0, 1, 1]


def test_what_no_rank_has_saved_is_an_error_of_that_tensor_alone() -> None:
    store = MemoryStore()
    states = [
        captured_parts({"w": torch.ones(2, 2), "v": torch.ones(1)}, {"w": ((6, 2), (2 * rank, 0))}, rank)
        for rank in range(2)
    ]
    save_parts(store, states)
    with opened(store) as reader:
        with pytest.raises(RestoreError, match=r"w is not whole: its ranks have saved only some of float32 \[6, 2\]"):
            reader["w"]
        assert reader["v"].item() == 1
    with pytest.raises(RestoreError, match="w is not whole"):
        loaded(store)


def test_parts_of_several_blocks() -> None:
    store = MemoryStore()
    whole = torch.arange(24.0).reshape(8, 3)
    states = []
    for rank in range(2):
        state = captured_parts({"w": whole[rank::2].clone()}, {}, rank)
        as_boxes(state, ("w",), whole.shape, [(row, 0) for row in range(rank, 8, 2)])
        states.append(state)
    save_parts(store, states)
    with opened(store) as reader:
        assert list(reader) == ["w"]
        assert same(reader["w"], whole)
    assert same(loaded(store)["w"], whole)


@pytest.mark.parametrize(
    ("shape", "offset"), [((4,), (0,)), ((4, 2, 1), (0, 0, 0)), ((4, 2), (3, 0)), ((4, 2), (0,)), ((2**50, 2), (0, 0))]
)
def test_places_that_cannot_be_are_errors(shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
    """As a hostile vote may name them."""
    store = MemoryStore()
    save_parts(store, [captured_parts({"w": torch.ones(2, 2)}, {"w": (shape, offset)}, rank) for rank in range(2)])
    with opened(store) as reader, pytest.raises(CheckpointError):
        reader["w"]
    with pytest.raises(CheckpointError):
        loaded(store)


class Box:
    """Pickled by its attributes."""

    def __init__(self, w: torch.Tensor) -> None:
        self.w, self.all = w, [w, (w,)]


def test_tensors_in_any_object_are_replaced() -> None:
    store = MemoryStore()
    whole = torch.arange(8.0).reshape(4, 2)
    states = []
    for rank in range(2):
        part = part_of(whole, (2, 1), rank)[0]
        states.append(
            captured_parts(
                {"o": Box(part)}, dict.fromkeys(("o.w", "o.all.0", "o.all.1.0"), ((4, 2), (2 * rank, 0))), rank
            )
        )
    save_parts(store, states)
    found = loaded(store)["o"]
    assert same(found.w, whole)
    assert found.all[0] is found.w
    assert found.all[1][0] is found.w


def test_what_cannot_be_replaced_is_refused() -> None:
    store = MemoryStore()
    states = []
    for rank in range(2):
        state = captured_parts({"a": {torch.ones(2)}}, {}, rank)  # no name leads into a set
        states.append(state)
    for rank, state in enumerate(states):
        named = captured_parts({"w": torch.ones(2)}, {"w": ((4,), (2 * rank,))}, rank)
        state.tensors[:] = named.tensors
    save_parts(store, states)
    with pytest.raises(RestoreError, match="w cannot be put where the saved objects have them"):
        loaded(store)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_gives_back_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3), "shape"))
    grid = tuple(data.draw(st.integers(1, 3), "parts") for _ in shape)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.complex64]), "dtype")
    whole = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    copies, n_parts = data.draw(st.integers(1, 2), "copies"), int(np.prod(grid))
    states = []
    for rank in range(copies * n_parts):
        part, offset = part_of(whole, grid, rank % n_parts)
        states.append(captured_parts({"w": part, "n": 1}, {"w": (shape, offset)}, rank))
    store = MemoryStore()
    save_parts(store, states)
    if len(states) == 1:
        return
    with opened(store) as reader:
        assert same(reader["w"], whole)
    assert same(loaded(store)["w"], whole)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_an_error_and_never_a_value(store: MemoryStore, seed: int) -> None:
    chance, commit = random.Random(seed), commit_of(store, 1)
    votes = [vote_key(commit.vote(rank)) for rank in range(WORLD)]
    key = chance.choice(keys_of(store, keys.DATA) if seed % 2 else votes)
    flip(store, key, chance.randrange(store.head(key).n_bytes))
    damaged: dict[str, CorruptCheckpointError] = {}
    try:
        with opened(store) as reader:
            for name, whole in wholes().items():
                try:
                    assert same(reader[f"model.{name}"], whole), "damage is never a value"
                except CorruptCheckpointError as error:
                    damaged[f"model.{name}"] = error
    except CorruptCheckpointError as error:  # what the vote lists is damaged
        damaged[""] = error
    if key in votes:
        assert damaged
        assert all(key in str(one) for one in damaged.values())
    for name, found_error in damaged.items():
        assert key in votes or any(name in item.tensors for item in found_error.damage), found_error
    try:
        found = loaded(store)
    except CorruptCheckpointError:
        return
    assert not damaged, "load reads all that was damaged"
    assert all(same(found["model"][name].detach(), whole) for name, whole in wholes().items())


def test_load_into_plain_tensors(store: MemoryStore) -> None:
    state = {"model": {name: torch.zeros_like(whole) for name, whole in wholes().items()}, "views": [torch.zeros(3, 4)]}
    with opened(store) as reader:
        assert len(reader.load_into(state)) == 5
        wrong = {"model": {"rows": torch.zeros(2), "x": torch.zeros(1)}, "mine": {"t": torch.zeros(4)}}
        with pytest.raises(UnknownTensorError) as error:
            reader.load_into(wrong)
    assert all(same(state["model"][name], whole) for name, whole in wholes().items())
    assert same(state["views"][0], torch.arange(12.0).reshape(3, 4))
    assert "model.rows: float32 [320, 200] in the checkpoint, float32 [2] in the state" in str(error.value)
    assert "model.x: not in the checkpoint" in str(error.value)
    assert "mine.t: each of ranks 0, 1, 2, 3 had its own" in str(error.value)


def test_of_container_is_what_a_rank_had(store: MemoryStore) -> None:
    ranks = SavedRanks(store, commit_of(store, 1))
    with TensorReader(OfContainer(ranks.whole(1), OPTIONS)) as reader:
        assert reader["mine.a"].tolist() == [1] * 9_000
