"""Single tensors by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastckpt
from fastckpt.errors import UnknownTensorError, UnsupportedFormatError
from fastckpt.reading.lazy_views import lazy_views
from fastckpt.reading.places import Places
from tests.support.readers import index_of

# torch deprecates its quantized types, which people still have in their files.
pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")


@pytest.fixture
def state() -> dict[object, object]:
    torch.manual_seed(1)
    base = torch.randn(300, 200)
    return {
        "model": {"w": base, "wt": base.t()[::2], "bias": torch.zeros(3, dtype=torch.bfloat16)},
        1: torch.tensor(1),
        "1": torch.tensor(2),
        "array": np.asfortranarray(np.arange(40_000, dtype="<f4").reshape(200, 200)),
        "empty": torch.empty(0, 4),
        "q": torch.quantize_per_tensor(torch.randn(8), 0.1, 0, torch.qint8),
        "sparse": torch.eye(4).to_sparse(),
    }


@pytest.fixture
def path(state: dict[object, object], tmp_path: Path) -> Path:
    target = tmp_path / "x.fckpt"
    fastckpt.save(state, target)
    return target


def test_names_shapes_values(state: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    with fastckpt.open(path) as reader:
        assert {"model.w", "model.wt", "array", "empty", "sparse.values", "sparse.indices"} <= set(reader)
        for name in ("w", "wt", "bias"):
            original, found = state["model"][name], reader[f"model.{name}"]
            assert torch.equal(original, found)
            assert (found.stride(), found.dtype) == (original.stride(), original.dtype)
        assert reader["empty"].shape == (0, 4)
        assert np.array_equal(reader["array"], state["array"])  # type: ignore[arg-type]
        assert reader["array"].flags.f_contiguous
        assert reader["array"].dtype == np.dtype("<f4")
        assert reader.entry("model.w").shape == (300, 200)


def test_each_tensor_has_memory_of_its_own(path: Path) -> None:
    with fastckpt.open(path) as reader:
        first, second = reader["model.w"], reader["model.w"]
        first.zero_()
        assert second.abs().sum() > 0


def test_names_that_look_alike(path: Path) -> None:
    with fastckpt.open(path) as reader:
        with pytest.raises(fastckpt.UnknownTensorError, match="is the name of 2 tensors"):
            reader["1"]
        assert reader[1,].item() == 1
        assert reader["1",].item() == 2


def test_unknown_and_quantized(path: Path) -> None:
    with fastckpt.open(path) as reader:
        with pytest.raises(fastckpt.UnknownTensorError, match=r"no tensor 'other.w'.*similar: model.w"):
            reader["other.w"]
        with pytest.raises(KeyError):
            reader["nope"]
        with pytest.raises(fastckpt.UnsupportedFormatError, match="quantized"):
            reader["q"]


def test_load_into(path: Path) -> None:
    target = {"model": {"w": torch.zeros(300, 200), "bias": torch.ones(3, dtype=torch.bfloat16)}}
    with fastckpt.open(path) as reader:
        assert sorted(reader.load_into(target)) == ["model.bias", "model.w"]
        assert torch.equal(target["model"]["w"], reader["model.w"])
        wrong = {"model": {"w": torch.zeros(2), "new": torch.zeros(1)}}
        with pytest.raises(fastckpt.UnknownTensorError, match=r"(?s)model.w: float32 \[300, 200\].*model.new: not in"):
            reader.load_into(wrong)
        assert reader.load_into(wrong, strict=False) == []


def test_refuses_files_of_others(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "torch.pt")
    with pytest.raises(fastckpt.NotACheckpointError, match=r"fastckpt\.load reads files of torch\.save"):
        fastckpt.open(tmp_path / "torch.pt")


def test_from_a_file_object(state: object) -> None:
    buffer = io.BytesIO(b"header")
    buffer.seek(6)
    fastckpt.save(state, buffer)
    buffer.seek(6)
    assert len(fastckpt.open(buffer)) > 5


def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The records that are read from now on."""
    read: list[int] = []
    settle = Places.settle

    def counted(self: Places, chunk: int, *arguments: Any) -> None:
        read.append(chunk)
        settle(self, chunk, *arguments)

    monkeypatch.setattr(Places, "settle", counted)
    return read


@pytest.fixture
def views(tmp_path: Path) -> Path:
    flat = torch.arange(3_000_000.0)
    views = {f"p{number}": view for number, view in enumerate(flat.split(100_000))}
    fastckpt.save({**views, "tied": flat, "array": np.arange(40_000.0)}, tmp_path / "views.fckpt")
    return tmp_path / "views.fckpt"


def test_views_of_one_storage_share_it(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastckpt.open(views) as reader:
        read = chunk_reads(monkeypatch)
        found = {name: reader[name] for name in reader if name != "array"}
        assert len(read) == len(set(read)), "a chunk was read again"
    assert len({tensor.untyped_storage()._cdata for tensor in found.values()}) == 1
    for number in range(30):
        assert torch.equal(found[f"p{number}"], torch.arange(100_000.0) + number * 100_000)
    again = io.BytesIO()
    fastckpt.save(found, again)
    assert again.tell() < 1.1 * views.stat().st_size, "they do not share it any more when they are saved"


def test_nothing_is_held_for_whoever_drops_it(views: Path) -> None:
    with fastckpt.open(views) as reader:
        first = reader["p0"]
        held = StorageWeakRef(first.untyped_storage())
        second = reader["p1"]
        del first
        assert not held.expired()
        del second
        assert held.expired()
        assert torch.equal(reader["p2"], torch.arange(100_000.0) + 200_000), "it is read again"


def test_a_name_that_is_asked_for_again_has_memory_of_its_own(views: Path) -> None:
    with fastckpt.open(views) as reader:
        first, other = reader["p0"], reader["p1"]
        first.zero_()
        again = reader["p0"]
        assert torch.equal(again, torch.arange(100_000.0))
        assert again.untyped_storage()._cdata == reader["p2"].untyped_storage()._cdata, "the newest one is shared"
        assert other.untyped_storage()._cdata == first.untyped_storage()._cdata


def test_load_into_reads_each_storage_once(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"p{number}": torch.zeros(100_000) for number in range(30)}
    with fastckpt.open(views) as reader:
        read = chunk_reads(monkeypatch)
        assert reader.load_into(state) == list(state)
        assert len(read) == len(set(read)), "a chunk was read again"
    assert all(torch.equal(state[f"p{n}"], torch.arange(100_000.0) + n * 100_000) for n in range(30))


def test_small_tensors_are_not_decoded_a_bundle_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.full((4,), float(number)) for number in range(500)}
    fastckpt.save(state, tmp_path / "x.fckpt")
    with fastckpt.open(tmp_path / "x.fckpt") as reader:
        pieces, inner = [], index_of(reader).pieces

        def counted(number: int) -> Any:
            pieces.append(number)
            return inner(number)

        monkeypatch.setattr(index_of(reader), "pieces", counted)
        read = chunk_reads(monkeypatch)
        assert all(torch.equal(reader[name], state[name]) for name in reader)
        assert len(pieces) == 500, "every fetch looks at every storage"
        assert len(read) == 1


@pytest.mark.parametrize("prefix", [(), ("model",)])
def test_a_module_and_its_state_dict_have_the_same_names(prefix: tuple[str, ...], tmp_path: Path) -> None:
    def nest(value: object) -> object:
        return {prefix[0]: value} if prefix else value

    first, second = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    for saved, into in ((first.state_dict(), second), (first, second.state_dict())):
        with torch.no_grad():
            second[0].weight.zero_()
        fastckpt.save(nest(saved), tmp_path / "x")
        with fastckpt.open(tmp_path / "x") as reader:
            reader.load_into(nest(into))
        assert torch.equal(second[0].weight, first[0].weight)  # type: ignore[arg-type]


def test_names_that_look_alike_are_not_mixed_up(tmp_path: Path) -> None:
    fastckpt.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "x")
    with fastckpt.open(tmp_path / "x") as reader:
        state = {"a.b": torch.full((1,), 9.0), "a": {"b": torch.full((1,), 9.0)}}
        reader.load_into(state)
        assert (state["a.b"].item(), state["a"]["b"].item()) == (1, 0)  # type: ignore[attr-defined]
        with pytest.raises(UnknownTensorError):
            reader.load_into({"a": (torch.zeros(1),)})


def saved_and_opened(state: Any) -> Any:
    file = io.BytesIO()
    fastckpt.save(state, file)
    file.seek(0)
    return fastckpt.open(file)


def test_what_torch_computes_when_it_is_read_comes_back_as_it_was() -> None:
    """Its bytes are not its values, and only the skeleton says so."""
    c = torch.complex(torch.arange(6.0), torch.ones(6)).view(2, 3)
    state: dict[str, Any] = {
        "x": c.conj(),
        "y": (c + 1).conj().imag,
        "z": c.clone(),
        "t": c.clone().conj().t(),
        "conj": torch.ones(2),
    }
    state |= {
        "list": [c.clone().conj(), {"deep": (c + 2).conj().imag}],
        "module": torch.nn.Linear(2, 2),
        "neg": True,
        "conjugate": 1,
    }
    reader = saved_and_opened(state)
    found = {name: reader[name] for name in ("x", "y", "z", "t", "conj", "list.0", "list.1.deep")}
    for name, tensor in found.items():
        wanted = (
            state[name]
            if name in state
            else {"list.0": state["list"][0], "list.1.deep": state["list"][1]["deep"]}[name]
        )
        assert torch.equal(tensor, wanted), name
        assert (tensor.is_conj(), tensor.is_neg()) == (wanted.is_conj(), wanted.is_neg())
    into = {"x": torch.zeros(2, 3, dtype=c.dtype), "y": torch.zeros(2, 3)}
    reader.load_into(into)
    assert torch.equal(into["x"], state["x"])
    assert torch.equal(into["y"], state["y"])


def test_a_skeleton_that_cannot_be_scanned_is_refused_in_words() -> None:
    assert lazy_views(b"") == {}
    assert lazy_views(b"X\x04\x00\x00\x00conj\x88neg") is None
    reader = saved_and_opened({"x": torch.ones(2), "conj": 1, "n": torch.arange(3)})
    reader._contents.reader.skeleton = b"conj"
    with pytest.raises(UnsupportedFormatError, match=r"may be conjugated or negated.*fastckpt\.load"):
        reader["x"]
    assert torch.equal(reader["n"], torch.arange(3)), "integers are never"
