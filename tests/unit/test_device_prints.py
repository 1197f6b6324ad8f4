"""Fingerprints that a device computes are those that the host computes of the same bytes; the CPU stands for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastckpt.kernels import kernels
from fastckpt.snapshot import device_prints
from fastckpt.snapshot.device_prints import ROW_BYTES, keys_on, row_prints

SEED = 0x1234_5678_9ABC_DEF0


def host_prints(content: bytes) -> list[int]:
    out = np.empty(-(-len(content) // ROW_BYTES), np.uint64)
    kernels().rows(content, keys_on("cpu", SEED).numpy().view(np.uint64), out)
    return [int(n) for n in out.view(np.int64)]


def chunks() -> list[list[torch.Tensor]]:
    """Whole rows, parts of rows, odd bytes, several pieces, other element types, starts that are no multiples of a word."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=generator)
    return [
        [noise[: 4 * ROW_BYTES]],
        [noise[3:1000]],
        [noise[5 : 5 + ROW_BYTES]],
        [noise[: 2 * ROW_BYTES].view(torch.float32).view(-1, 8)],
        [noise[64:164].view(torch.bfloat16), noise[200:300].view(torch.bfloat16), noise[:4000].view(torch.bfloat16)],
        [noise[: ROW_BYTES + 1]],
        [torch.tensor(1.5, dtype=torch.float64)],
        [noise > 100],
        [torch.nn.Parameter(torch.ones(100, 100))],
    ]


@pytest.mark.parametrize("batch_rows", [1, 3, 1024])
def test_device_and_host_agree(monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    monkeypatch.setattr(device_prints, "_BATCH_ROWS", batch_rows)
    made = chunks()
    contents = [b"".join(p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for p in pieces) for pieces in made]
    expected = [n for content in contents for n in host_prints(content)]
    assert row_prints(made, "cpu", SEED).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_constants_signs_and_swapped_places_are_told_apart(dtype: torch.dtype) -> None:
    """A sum of words times constants loses changes of high bits: zeros and twos were the same."""
    n = 2 * ROW_BYTES // dtype.itemsize
    found = {v: tuple(row_prints([[torch.full((n,), v, dtype=dtype)]], "cpu", SEED).tolist()) for v in (0, 1, 2, -2, 4)}
    assert len({*found.values()}) == len(found)
    values = torch.arange(n).remainder(100).sub(50).to(dtype)
    one = row_prints([[values]], "cpu", SEED)
    assert (row_prints([[-values]], "cpu", SEED) != one).all()
    swapped = values.clone()
    swapped[[0, 70]] = values[[70, 0]]
    assert row_prints([[swapped]], "cpu", SEED)[0] != one[0]
    assert row_prints([[values]], "cpu", SEED + 2).tolist() != one.tolist()
