"""FastckptWriter and FastckptReader in one process. tests/distributed/test_dcp.py has real ranks."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import fastckpt
from fastckpt import events
from fastckpt.dcp import FastckptReader, FastckptSavePlanner, FastckptWriter
from fastckpt.errors import (
    StoreError,
)
from fastckpt.integrations.dcp import turns
from fastckpt.options import Options
from fastckpt.store.open import open_store
from tests.support.dcp import HAS_USE_COLLECTIVES, IGNORED, load, packs, save

pytestmark = pytest.mark.filterwarnings(IGNORED)


def zeros_like(value: Any) -> Any:
    """A target of the same form."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: zeros_like(item) for key, item in value.items()}
    if isinstance(value, list):
        return [zeros_like(item) for item in value]
    return None


def same(a: Any, b: Any) -> bool:
    """Equal in types, structure and bits; strides aside."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [
            torch.empty(t.shape, dtype=t.dtype).copy_(t).reshape(-1).view(torch.uint8).tolist()
            for t in (a, b)
            if t.numel()
        ]
        return a.dtype == b.dtype and a.shape == b.shape and bits[:1] == bits[1:]
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or repr(a) == repr(b) == "nan")


def sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list) else value


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape: list[int] = draw(st.lists(st.integers(0, 5), max_size=3))
    n = math.prod(shape)
    found = (torch.arange(n) * draw(st.integers(1, 99)) % 251).to(torch.float32).to(dtype).reshape(shape)
    if shape and draw(st.booleans()):
        found = found.transpose(0, -1)
    if shape and shape[0] > 1 and draw(st.booleans()):
        found = found[::2]
    return found


LEAVES = tensors() | st.integers() | st.floats() | st.text(max_size=5) | st.none() | st.lists(st.integers(), max_size=2)
KEYS = st.text("abé_", min_size=1, max_size=3)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(tensors(), max_size=3), max_leaves=8
    ),
    min_size=1,
    max_size=4,
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(state=STATES, numbers=st.integers())
def test_a_state_comes_back_with_its_empty_dictionaries(state: dict[str, Any], numbers: int, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}-{numbers}"
    save(url, copy.deepcopy(state), planner=FastckptSavePlanner())
    assert same(sorted_keys(FastckptReader(url).read_state_dict()), sorted_keys(state))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@FEW
@given(state=STATES)
def test_dcp_loads_what_it_loads_from_its_own_files(
    state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("differential")
    loaded = []
    for reader, written in (
        (FastckptReader(folder / "ours"), FastckptWriter(folder / "ours")),
        (FileSystemReader(folder / "theirs"), FileSystemWriter(folder / "theirs")),
    ):
        dcp_save(copy.deepcopy(state), storage_writer=written)
        target = zeros_like(state)
        dcp_load(target, storage_reader=reader)
        loaded.append(target)
    assert same(*loaded)


def test_order_and_tied_weights(tmp_path: Path) -> None:
    weight = torch.randn(300, 300)
    state = {"z": {"w": weight, "n": 1}, "a": weight, "m": weight.t(), "b": [torch.ones(2), torch.zeros(3)]}
    save(tmp_path, state)
    assert list(FastckptReader(tmp_path).read_state_dict()["z"]) == ["w", "n"]
    stored = sum(pack.stat().st_size for pack in packs(tmp_path))
    assert stored < 1.1 * weight.nbytes  # torch writes 3 × 360,000 bytes
    target = load(tmp_path, zeros_like(state))
    assert torch.equal(target["a"], weight)
    assert torch.equal(target["m"], weight.t())


def test_small_items_are_packed(tmp_path: Path) -> None:
    state = {f"step.{n}": torch.tensor(float(n)) for n in range(1000)}
    save(tmp_path, state)
    n_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert n_bytes < 300 * len(state)  # torch: 1,577 for each, and 185 of metadata
    assert len(packs(tmp_path)) == 1


def test_of_a_narrow_view_only_the_view_is_stored(tmp_path: Path) -> None:
    whole = torch.randn(1000, 100)
    save(tmp_path, {"row": whole[7], "columns": whole[:, 3:5], "same": whole[7]})
    assert sum(pack.stat().st_size for pack in packs(tmp_path)) < 20_000
    target = load(tmp_path, {"row": torch.zeros(100), "columns": torch.zeros(1000, 2)})
    assert torch.equal(target["row"], whole[7])
    assert torch.equal(target["columns"], whole[:, 3:5])


def test_odd_tensors(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    values = torch.randn(3, 4, dtype=torch.complex64)
    state = {
        "scalar": torch.tensor(2.5),
        "expanded": torch.ones(1).expand(5),
        "conj": values.conj(),
        "neg": torch._neg_view(values.imag),
        "as ints": base.view(torch.int32),
        "as floats": base,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    save(tmp_path, state)
    found = FastckptReader(tmp_path).read_state_dict()
    for name, value in state.items():
        assert torch.equal(found[name], value.detach().resolve_conj().resolve_neg()), name
    metadata: Any = FastckptReader(tmp_path).read_metadata()
    assert metadata.state_dict_metadata["parameter"].properties.requires_grad


def test_torch_finds_in_the_methods_what_it_looks_for() -> None:
    for method in (
        FastckptWriter.set_up_storage_writer,
        FastckptReader.set_up_storage_reader,
        FastckptReader.read_metadata,
    ):
        assert "kwargs" in inspect.signature(method).parameters
    torch_stages = "async_stager" in inspect.signature(async_save).parameters
    assert isinstance(FastckptWriter("x"), AsyncStager) is not torch_stages
    names = ("stage", "synchronize_staging", "close", "should_synchronize_after_execute", "_synchronize_after_execute")
    assert not torch_stages or not any(hasattr(FastckptWriter, name) for name in names)


def test_places(tmp_path: Path) -> None:
    for kind in (FastckptWriter, FastckptReader):
        good = ("s3://b/p", "gs://b/p", "az://b/p", tmp_path, str(tmp_path), f"file://{tmp_path}", "memory://x")
        assert all(kind.validate_checkpoint_id(one) for one in good)
        assert not any(kind.validate_checkpoint_id(one) for one in ("", "hdfs://b/p", "file://relative"))
        with pytest.raises(StoreError, match="hdfs://b"):
            kind("hdfs://b/p")
        with pytest.raises(StoreError):
            kind().reset("hdfs://x/y")
        one = kind("s3://bucket/run/")
        assert one.checkpoint_id == "s3://bucket/run/"
        one.reset()
        assert one.checkpoint_id == "s3://bucket/run/"
        one.reset(Path("s3://bucket/other"))
        assert pickle.loads(pickle.dumps(one)).checkpoint_id == "s3://bucket/other"
    with pytest.raises(CheckpointException, match="no place to save to"):
        dcp_save({}, storage_writer=FastckptWriter())
    with pytest.raises(CheckpointException, match="no place to load from"):
        dcp_load({}, storage_reader=FastckptReader())


def test_storage_meta(tmp_path: Path) -> None:
    one = FastckptWriter(tmp_path)
    first = one.storage_meta()
    one.reset(tmp_path / "b")
    assert (first.checkpoint_id, one.storage_meta().checkpoint_id) == (str(tmp_path), str(tmp_path / "b"))
    assert first.save_id != one.storage_meta().save_id
    assert save(tmp_path / "b", {"x": 1}, writer=one).storage_meta.checkpoint_id == str(tmp_path / "b")


def test_one_writer_saves_many_checkpoints(tmp_path: Path) -> None:
    one, other = FastckptWriter(), FastckptReader()
    for step in (5, 10, 15):
        save(tmp_path / f"step-{step}", {"x": torch.full((3,), float(step)), "step": step}, writer=one)
    for step in (5, 10, 15):
        found = load(tmp_path / f"step-{step}", {"x": torch.zeros(3), "step": 0}, reader=other)
        assert found["step"] == step
        assert found["x"].tolist() == [step] * 3
        with fastckpt.open(tmp_path / f"step-{step}") as tensors_of:
            assert tensors_of["x"].tolist() == [step] * 3
    assert next(iter((tmp_path / "step-10" / "commits").iterdir())).name == f"{1:06}-{10:012}.json"


@pytest.mark.parametrize(("where", "step"), [("run/step-100", 100), ("run/00012/", 12), ("run", 0), ("v2/last", 0)])
def test_the_number_at_the_end_of_an_id_is_its_step(where: str, step: int) -> None:
    assert turns.step_of(where) == step


def test_planners_that_do_not_flatten(tmp_path: Path) -> None:
    save(tmp_path, {"a.b": torch.ones(2), "c": {"d": 1}}, planner=DefaultSavePlanner(flatten_state_dict=False))
    assert FastckptReader(tmp_path).read_metadata().planner_data is None
    found = load(tmp_path, {"a.b": torch.zeros(2), "c": None}, planner=DefaultLoadPlanner(False, False))
    assert found["c"] == {"d": 1}
    assert found["a.b"].all()


def test_planners_that_rename_and_convert(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            super().set_up_planner(state_dict, storage_meta, is_coordinator)
            self.state_dict = {f"new.{key}": value for key, value in self.state_dict.items()}
            self.mappings = {f"new.{key}": path for key, path in self.mappings.items()}

        def transform_object(self, write_item: Any, object: Any) -> Any:
            found = super().transform_object(write_item, object)
            return found.half() if isinstance(found, torch.Tensor) else found

    save(tmp_path, {"a": {"b": torch.ones(2)}, "n": 3}, planner=Planner())
    metadata: Any = FastckptReader(tmp_path).read_metadata()
    assert metadata.planner_data == {"new.a.b": ("a", "b"), "new.n": ("n",)}
    assert metadata.state_dict_metadata["new.a.b"].properties.dtype == torch.float16
    assert FastckptReader(tmp_path).read_state_dict() == {"a": {"b": pytest.approx(torch.ones(2).half())}, "n": 3}


@pytest.fixture
def chunks() -> Iterator[list[str]]:
    seen: list[str] = []
    with events.subscribe(lambda e: seen.append(type(e).__name__) if isinstance(e, events.ChunkLoaded) else None):
        yield seen


def test_only_what_is_needed_is_read(tmp_path: Path, chunks: list[str]) -> None:
    save(tmp_path, {"a": torch.randn(3 << 20), "b": torch.randn(3 << 20), "c": torch.randn(2)})
    load(tmp_path, {"b": torch.zeros(3 << 20)})
    assert len(chunks) == 3
    chunks.clear()
    found = FastckptReader(tmp_path).read_state_dict(["c"])
    assert list(found) == ["c"]
    assert len(chunks) == 1


@pytest.mark.skipif(not HAS_USE_COLLECTIVES, reason="torch 2.6 has collectives only")
def test_each_rank_for_itself(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(2)}, use_collectives=False)
    assert (tmp_path / "rank-00000" / "commits").is_dir()
    assert load(tmp_path, {"x": torch.zeros(2)})["x"].all()


@pytest.mark.skipif("no_dist" not in inspect.signature(dcp_save).parameters, reason="torch 2.6 decides it by itself")
def test_one_process_by_request(tmp_path: Path) -> None:
    settings: Any = {"no_dist": True}
    save(tmp_path, {"x": torch.ones(2)}, **settings)
    assert load(tmp_path, {"x": torch.zeros(2)}, **settings)["x"].all()


def test_async_save_copies_the_state(tmp_path: Path) -> None:
    weight = torch.ones(70_000)
    state = {"x": weight, "tied": weight, "nested": [{"y": torch.ones(3)}], "steps": [1, 2]}
    future: Any = async_save(state, checkpoint_id=tmp_path, storage_writer=FastckptWriter())
    weight.zero_()
    state["steps"].append(3)  # type: ignore[attr-defined]
    future.result()
    found = FastckptReader(tmp_path).read_state_dict()
    assert found["x"].all()
    assert found["steps"] == [1, 2]
    with fastckpt.open(tmp_path) as reader:
        assert reader.summary["raw_bytes"] < 2 * weight.nbytes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_checkpoint_of_a_checkpointer(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with fastckpt.Checkpointer(tmp_path, {"model": model}, spot=None) as ckpt:
        ckpt.save_now(7)
    target = {"model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    assert same(load(tmp_path, target)["model"], {name: value.detach() for name, value in model.state_dict().items()})
    assert torch.equal(FastckptReader(tmp_path, step=7).read_state_dict()["model"]["weight"], model.weight)


class InTwo(DefaultSavePlanner):
    """Gives each tensor in two blocks, as a rank with several shards does."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            data: Any = item.tensor_data
            n = 0 if data is None else data.size[0]
            for start, stop in ((0, n // 2), (n // 2, n)) if data is not None else ():
                at = torch.Size([start, *data.chunk.offsets[1:]])
                chunk = ChunkStorageMetadata(at, torch.Size([stop - start, *data.size[1:]]))
                block: Any = replace(data, chunk=chunk)
                items.append(
                    replace(item, index=replace(item.index, offset=at), type=WriteItemType.SHARD, tensor_data=block)
                )
            items += [] if data is not None else [item]
        return replace(plan, items=items)

    def lookup_object(self, index: Any) -> Any:
        value = self.state_dict[index.fqn]
        if not isinstance(value, torch.Tensor):
            return value
        half = value.shape[0] // 2
        return value[half:] if index.offset[0] else value[:half]


def test_several_blocks_of_one_rank(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.randn(7, 3), "box": {"0": torch.randn(4)}, "n": 5}
    save(tmp_path, state, planner=InTwo())
    found = FastckptReader(tmp_path).read_state_dict()
    assert same(sorted_keys(found), sorted_keys(state))
    loaded = load(tmp_path, zeros_like(state))
    assert same(loaded, state)
    with fastckpt.open(tmp_path) as tensors_of:
        assert torch.equal(tensors_of["w.box.1"], state["w"][3:])


def test_a_pickled_writer_has_forgotten_its_save(tmp_path: Path) -> None:
    one = FastckptWriter(tmp_path, overwrite=False, options=Options(threads=1))
    save(tmp_path, {"x": torch.ones(2)}, writer=pickle.loads(pickle.dumps(one)))
    with open_store(tmp_path) as store:
        assert [info.key for info in store.list("commits/")] == [
            f"commits/{1:06}-{turns.step_of(str(tmp_path)):012}.json"
        ]
