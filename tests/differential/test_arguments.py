"""Locations, file objects, streams and files of other makers."""

from __future__ import annotations

import gzip
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fastckpt
from tests.differential.tools import describe, same, through_ours, through_torch


def state() -> dict[str, Any]:
    x = torch.arange(50_000.0)
    return {"x": x, "tie": x, "view": x[3:9:2], "empty": torch.empty(0), "half": torch.ones(3).half(), "list": [1, "a"]}


@pytest.mark.parametrize(
    "location",
    [
        None,
        "cpu",
        torch.device("cpu"),
        {"cpu": "cpu"},
        {"cuda:0": "cpu"},
        {},
        "meta",
        torch.device("meta"),
        {"cpu": "meta"},
    ],
    ids=str,
)
def test_locations(location: Any, tmp_path: Path) -> None:
    same(state(), tmp_path, map_location=location)
    same(state(), map_location=location, mmap=False)


@pytest.mark.parametrize(
    "answer", [lambda s, tag: s, lambda s, tag: None, lambda s, tag: s.clone()], ids=["same", "none", "clone"]
)
def test_callable_location(answer: Callable[[Any, str], Any]) -> None:
    calls: list[list[Any]] = []
    for through in (through_torch, through_ours):
        seen: list[Any] = []

        def location(storage: Any, tag: str, seen: list[Any] = seen) -> Any:
            seen.append((type(storage), tag, storage.nbytes(), bytes(storage), str(storage.device)))
            return answer(storage, tag)

        calls.append([seen, describe(through(state(), map_location=location))])
    assert calls[0] == calls[1]
    assert len(calls[1][0]) == 3


def test_callable_location_of_arrays() -> None:
    seen = []
    arrays = [np.zeros(20_000), torch.ones(1)]
    through_ours(arrays, map_location=lambda s, tag: seen.append(tag), weights_only=False)
    assert seen == ["cpu"]


def test_mmap(tmp_path: Path) -> None:
    path, theirs = tmp_path / "a", tmp_path / "b"
    fastckpt.save(state(), path)
    torch.save(state(), theirs)
    assert describe(fastckpt.load(path, mmap=True)) == describe(torch.load(theirs))
    assert describe(fastckpt.load(theirs, mmap=True)) == describe(torch.load(theirs))


class WriteOnly:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> None:
        self.data += data

    def flush(self) -> None:
        pass


def test_write_only_target() -> None:
    target = WriteOnly()
    fastckpt.save(state(), target)
    assert describe(fastckpt.load(io.BytesIO(target.data))) == describe(through_torch(state()))


def test_several_in_one_stream() -> None:
    file = io.BytesIO()
    file.write(b"a header of ours")
    for number in range(3):
        fastckpt.save({**state(), "n": number}, file)
    end = file.tell()
    file.seek(16)
    for number in range(3):
        assert describe(fastckpt.load(file)) == describe(through_torch({**state(), "n": number}))
    assert file.tell() == end


def files(path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: path.open("wb+"),
        lambda: path.open("wb+", buffering=0),
        lambda: tempfile.SpooledTemporaryFile(1000),
    ]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_file_objects(kind: int, tmp_path: Path) -> None:
    with files(tmp_path / "x")[kind]() as file:
        fastckpt.save(state(), file)
        assert not file.closed
        end = file.tell()
        file.seek(0)
        assert describe(fastckpt.load(file)) == describe(through_torch(state()))
        assert file.tell() == end
        file.seek(0)
        file.truncate()
        torch.save(state(), file)
        file.seek(0)
        assert describe(fastckpt.load(file)) == describe(through_torch(state()))


def test_gzip(tmp_path: Path) -> None:
    for save in (fastckpt.save, torch.save):
        with gzip.open(tmp_path / "x.gz", "wb") as file:
            save(state(), file)
        with gzip.open(tmp_path / "x.gz") as file:
            assert describe(fastckpt.load(file)) == describe(through_torch(state()))


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_files_of_torch(zip_format: bool, weights_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "é x.pt"
    torch.save(state(), path, _use_new_zipfile_serialization=zip_format)
    expected = describe(torch.load(path, weights_only=weights_only))
    assert describe(fastckpt.load(path, weights_only=weights_only)) == expected
    assert describe(fastckpt.load(str(path), map_location="cpu", weights_only=weights_only)) == expected
    assert describe(fastckpt.load(io.BytesIO(path.read_bytes()), weights_only=weights_only)) == expected


def test_legacy_is_written_as_torch_does(tmp_path: Path) -> None:
    theirs, ours = io.BytesIO(), io.BytesIO()
    torch.save([1, torch.ones(2)], theirs, _use_new_zipfile_serialization=False)
    fastckpt.save([1, torch.ones(2)], ours, _use_new_zipfile_serialization=False)
    fastckpt.save([1, torch.ones(2)], tmp_path / "x", _use_new_zipfile_serialization=False)
    for data in (ours.getvalue(), (tmp_path / "x").read_bytes()):
        assert describe(torch.load(io.BytesIO(data))) == describe(torch.load(io.BytesIO(theirs.getvalue())))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_of_safetensors(suffix: str, tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.ones(2).bfloat16()}
    path = tmp_path / f"x{suffix}"
    safetensors.torch.save_file(tensors, path)
    expected = safetensors.torch.load_file(path)
    for f in (path, str(path), io.BytesIO(path.read_bytes())):
        found = fastckpt.load(f, map_location="cpu")
        assert {name: describe(found[name]) for name in sorted(found)} == {
            name: describe(expected[name]) for name in sorted(expected)
        }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol: int) -> None:
    file = io.BytesIO()
    fastckpt.save(state(), file, pickle, protocol)
    file.seek(0)
    assert describe(fastckpt.load(file, None, pickle)) == describe(through_torch(state(), weights_only=False))


def test_default_device_and_inference_mode() -> None:
    with torch.device("meta"):
        assert describe(through_ours({"x": torch.ones(2, device="cpu")})) == describe(
            through_torch({"x": torch.ones(2, device="cpu")})
        )
    with torch.inference_mode():
        same(torch.ones(2))
