"""One state, one file: whatever the threads and the instruction set."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from tests.faults.tools import ARRAY_GLOBALS, Parts
from tests.properties.test_kernels import ISAS, _native
from tests.support.readers import index_of


def state() -> dict[str, Any]:
    """More than 4 MiB, so that threads are used; equal chunks among them."""
    generator = torch.Generator().manual_seed(5)
    big = torch.randn(1_500_000, generator=generator)
    return {
        "big": big,
        "copy": big.clone(),
        "bf16": torch.randn(600_000, generator=generator).to(torch.bfloat16),
        "small": [torch.randn(100 + i, generator=generator) for i in range(40)],
        "ints": torch.arange(300_000),
        "zeros": torch.zeros(2_000_000),
        "array": np.random.default_rng(1).standard_normal(20_000),
    }


def saved() -> bytes:
    out = io.BytesIO()
    fastckpt.save(state(), out)
    return out.getvalue()


@cache
def first() -> bytes:
    return saved()


def rows_of(data: bytes) -> Any:
    with fastckpt.open(io.BytesIO(data)) as reader:
        return index_of(reader).records


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_do_not_show(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_THREADS", str(threads))
    assert saved() == first()


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_do_not_show(isa: str) -> None:
    _native.use_isa(isa)
    try:
        assert saved() == first()
    finally:
        _native.use_isa(None)


def test_kernels_show_in_frames_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without native kernels the frames are libzstd's, the same for numba and NumPy. Everything reads everything."""
    made = {}
    for kernels in ("numba", "reference", *(["native"] if ISAS else [])):
        monkeypatch.setenv("FASTCKPT_KERNELS", kernels)
        made[kernels] = saved()
    assert made["numba"] == made["reference"]
    assert len(made["reference"]) == pytest.approx(len(first()), rel=0.01)
    digests = {rows_of(data)["digest"].tobytes() for data in made.values()}
    assert len(digests) == 1
    for kernels in made:
        monkeypatch.setenv("FASTCKPT_KERNELS", kernels)
        for data in made.values():
            with torch.serialization.safe_globals(ARRAY_GLOBALS):
                assert torch.equal(fastckpt.load(io.BytesIO(data))["big"], state()["big"])


def test_a_path_and_a_file_object_get_the_same(tmp_path: Any) -> None:
    fastckpt.save(state(), tmp_path / "a.fckpt")
    assert (tmp_path / "a.fckpt").read_bytes() == first()


def test_without_compression_all_is_raw_or_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_COMPRESS", "0")
    assert set(rows_of(saved())["transform"].tolist()) == {1, 2}
    assert set(rows_of(first())["transform"].tolist()) == {1, 2, 3}


def test_equal_chunks_share_bytes_but_not_memory() -> None:
    with fastckpt.open(io.BytesIO(first())) as reader:
        directory, rows = index_of(reader).directory, index_of(reader).records
        a, b = (directory.storages[reader.entry(name).storage] for name in ("big", "copy"))
    assert a.extents is not None
    assert b.extents is not None
    assert a.extents != b.extents
    assert rows[a.extents[0].record].tobytes() == rows[b.extents[0].record].tobytes()
    with torch.serialization.safe_globals(ARRAY_GLOBALS):
        loaded = fastckpt.load(io.BytesIO(first()))
    assert loaded["big"].data_ptr() != loaded["copy"].data_ptr()
    loaded["big"].zero_()
    assert torch.equal(loaded["copy"], state()["copy"])


def test_nothing_of_time_or_host_is_in_the_directory() -> None:
    assert json.loads(Parts.of(first()).directory)["writer"].keys() <= {"name", "version", "torch", "python"}


def test_an_unrestricted_load_gives_the_same() -> None:
    assert torch.equal(fastckpt.load(io.BytesIO(first()), weights_only=False)["big"], state()["big"])
