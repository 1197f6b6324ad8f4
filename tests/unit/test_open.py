"""Single tensors by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

import fastckpt

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
        assert np.array_equal(reader["array"], state["array"])
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
