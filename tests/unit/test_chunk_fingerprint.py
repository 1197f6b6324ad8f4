"""Fingerprints of chunks: what defines them, that each implementation gives the same, and what they tell apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastckpt._types import U64
from fastckpt.kernels import reference, select
from fastckpt.kernels.fingerprint import cuda_source, fingerprint
from fastckpt.snapshot import fingerprint_op
from fastckpt.snapshot.fingerprint_op import fingerprints

KEYS = (0x1234_5678_9ABC_DEF0, -0x0FED_CBA9_8765_4321)
WORDS = np.array(KEYS, np.int64).view(np.uint64)


def of(data: Any, keys: U64 = WORDS) -> list[int]:
    out = np.empty(2, np.uint64)
    fingerprint(data, keys, out)
    return [int(n) for n in out.view(np.int64)]


def by_definition(content: bytes) -> list[int]:
    """Word by word, with Python's integers."""

    def mixed(x: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> 33)) * factor % (1 << 64)
        return x ^ (x >> 33)

    padded = content.ljust(-(-len(content) // 8) * 8, b"\0")
    words = [len(content), *np.frombuffer(padded, np.uint64).tolist()]
    found = []
    for key, step in zip(WORDS.tolist(), (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F), strict=True):
        total = sum(mixed(word ^ (key + i * step) % (1 << 64)) for i, word in enumerate(words)) % (1 << 64)
        found.append(total - (1 << 64) if total >> 63 else total)
    return found


@pytest.mark.parametrize("kernels", ["native", "reference"])
@given(content=st.binary(max_size=300))
def test_it_is_what_it_is_defined_to_be(kernels: str, content: bytes) -> None:
    if kernels == "native" and not select.native_is_available():
        pytest.skip("the native module is not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(select.ENV, kernels)
        assert of(content) == by_definition(content)


def test_long_contents_agree() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1 << 20) + 5, np.uint8)
    for data in (noise, noise[3:], noise[:-5]):
        out = np.empty(2, np.uint64)
        reference.fingerprint(data, WORDS, out)
        assert of(data) == out.view(np.int64).tolist()


def test_wrong_arguments_are_refused() -> None:
    for keys, out in ((1, 2), (3, 2), (2, 1), (2, 3)):
        for function in (fingerprint, reference.fingerprint):
            with pytest.raises(ValueError, match=f"{keys} keys, room for {out} words: expected 2 of each"):
                function(b"12345678", np.zeros(keys, np.uint64), np.zeros(out, np.uint64))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_structured_changes_are_told_apart(dtype: type) -> None:
    """Constants, signs, exponents, swapped and shifted places, lengths: what sums of simpler terms lose."""
    n = 4096
    values: npt.NDArray[Any] = np.random.default_rng(2).integers(-50, 50, n).astype(dtype)
    swapped = values.copy()
    swapped[[0, 700]] = values[[700, 0]]
    flipped = values.copy()
    flipped[:8] *= -1
    contents = [
        *(np.full(n, v, dtype) for v in (0, 1, 2, -1, -2, 4)),
        values, -values, 2 * values, swapped, flipped, values[::-1], np.roll(values, 1), np.roll(values, 64 // values.itemsize),
        np.zeros(n - 1, dtype), np.zeros(n + 8, dtype),
    ]  # fmt: skip
    distinct = {content.tobytes() for content in contents}
    assert len({tuple(of(content.tobytes())) for content in contents}) == len(distinct)
    sums = [{of(content)[s] for content in distinct} for s in range(2)]
    assert len(sums[0]) == len(sums[1]) == len(distinct), "nor does one of the two sums"


def test_each_bit_counts_and_keys_change_everything() -> None:
    content = np.zeros(64, np.uint8)
    seen = {tuple(of(content))}
    for bit in range(8 * content.size):
        content[bit // 8] = 1 << bit % 8
        seen.add(tuple(of(content)))
        content[bit // 8] = 0
    assert len(seen) == 513
    assert of(content, WORDS + np.uint64(1)) != of(content)


# -- the operator --------------------------------------------------------------------------------------------------------


def chunks() -> list[torch.Tensor]:
    noise = torch.randint(0, 256, (300_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return [
        noise[:4096],
        noise[4096:8192],
        noise[3:1000],
        noise[5:5],
        noise[:1],
        noise[:4096].view(torch.float32).view(-1, 8),
        noise[64:164].view(torch.bfloat16),
        torch.tensor(1.5, dtype=torch.float64),
        noise > 100,
        torch.nn.Parameter(torch.ones(100, 100)),
        noise[:300].view(10, 30).t(),
        noise,
    ]


def expected() -> list[list[int]]:
    return [of(chunk.detach().contiguous().view(-1).view(torch.uint8).numpy()) for chunk in chunks()]


def test_the_operator_gives_the_same_on_the_cpu() -> None:
    found = fingerprints(chunks(), KEYS)
    assert found.tolist() == expected()
    assert not found.requires_grad


@pytest.mark.parametrize("batch_bytes", [1 << 12, 8 << 20])
def test_torchs_own_operators_give_the_same(monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr(fingerprint_op, "_BATCH_BYTES", batch_bytes)
    assert fingerprint_op._on_any(chunks(), *KEYS).tolist() == expected()


# torch 2.14's own check looks at `.grad` of what it has made.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_torch_accepts_the_operator() -> None:
    """Over 5 s: opcheck compiles."""
    fingerprints(chunks()[:1], KEYS)
    some = [chunks()[0], torch.ones(10, requires_grad=True)]
    outcome = torch.library.opcheck(torch.ops.fastckpt.fingerprint.default, (some, *KEYS))
    assert set(outcome.values()) == {"SUCCESS"}
    on_meta = fingerprints([torch.empty(5, device="meta")] * 3, KEYS)
    assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == ("meta", (3, 2), torch.int64)


def test_without_the_native_module_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fastckpt._native", None)
    with pytest.raises(RuntimeError, match="the native module, which has the kernel's text, cannot be imported"):
        cuda_source()
