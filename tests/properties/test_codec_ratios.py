"""Sizes are a promise like correctness: what real slices take, to 0.2 %. A change that makes them larger fails here; one that makes them
smaller is entered into the table.

codec_data.npz: 64 Ki numbers of each kind (make_codec_data.py). Speeds are not asserted anywhere; they are in benchmarks/results.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastckpt import codec
from fastckpt.codec import Effort
from fastckpt.kernels import kernels
from fastckpt.kernels.transform import Transform

DATA = Path(__file__).with_name("codec_data.npz")
# Kind: transform, stored / raw by the native kernels, and by libzstd as an entropy coder.
TABLE = {
    "params bf16": (Transform.ROT, 0.6692, 0.6632),
    "params fp32": (Transform.ROT, 0.8347, 0.8326),
    "exp_avg bf16": (Transform.ROT, 0.6839, 0.6826),
    "exp_avg fp32": (Transform.ROT, 0.8419, 0.8410),
    "exp_avg_sq bf16": (Transform.ROTU, 0.6150, 0.6252),
    "exp_avg_sq fp32": (Transform.ROTU, 0.8096, 0.8147),
    "exp_avg_sq fp32, zero rows": (Transform.ROTU, 0.3516, 0.3772),
    "fine-tuned bf16, 1 step": (
        Transform.SUBPACK,
        0.0014,
        0.0010,
    ),  # 177 bytes: small blocks have no codes for literals
    "fine-tuned bf16, 50 steps": (Transform.SUBPACK, 0.0071, 0.0074),
}


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(DATA) as found:
        return {name: found[name] for name in found.files}


@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize("kind", TABLE)
def test_sizes(kind: str, kernel: str, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "native" and kernels().name != "native":
        pytest.skip("no native kernels: there was no compiler")
    monkeypatch.setenv("FASTCKPT_KERNELS", kernel)
    transform, native, zstd = TABLE[kind]
    lanes = data[kind]
    base = data.get(f"{kind}, base")
    raw = lanes.view(np.uint8)
    encoded = codec.encode(raw, lanes.itemsize, lanes.itemsize, base=None if base is None else base.view(np.uint8))
    ratio = len(encoded.stored) / raw.size
    expected = native if kernel == "native" else zstd
    print(f"{kind}: {encoded.transform.name} {ratio:.4f}, expected {expected}")
    if kernel == "reference" and kind.endswith("zero rows"):
        transform = Transform.ROT  # for zstd's match search
    assert encoded.transform is transform
    assert ratio <= expected * 1.002 + 1e-4


@pytest.mark.parametrize("effort", [Effort.FAST, Effort.NORMAL, Effort.HIGH])
def test_zero_rows_are_found_by_each_effort(effort: Effort, data: dict[str, np.ndarray]) -> None:
    if kernels().name != "native":
        pytest.skip("no native kernels: there was no compiler")
    raw = data["exp_avg_sq fp32, zero rows"].view(np.uint8)
    assert len(codec.encode(raw, 4, 4, effort=effort).stored) <= 0.3516 * raw.size


def test_no_difference_takes_the_place_of_a_smaller_chunk(data: dict[str, np.ndarray]) -> None:
    """Zero rows are cheap in full: what is not the base's is not worth a difference then."""
    if kernels().name != "native":
        pytest.skip("no native kernels: there was no compiler")
    lanes = data["exp_avg_sq fp32, zero rows"]
    base = np.where(lanes == 0, lanes, np.random.default_rng(5).random(lanes.size, np.float32).reshape(lanes.shape))
    encoded = codec.encode(lanes.view(np.uint8), 4, 4, base=base.astype(np.float32).view(np.uint8))
    assert encoded.transform is Transform.ROTU


def test_effort_buys_size() -> None:
    rows = np.random.default_rng(3).standard_normal((64, 256), np.float32)
    rows[:, ::2] = rows[:, 1:40:2] = 0  # hardly any runs, but rows come again
    lanes = rows[np.random.default_rng(4).integers(0, 64, 1024)]
    sizes = [len(codec.encode(lanes.reshape(-1).view(np.uint8), 4, 4, effort=effort).stored) for effort in Effort]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[Effort.NORMAL] < 0.97 * sizes[Effort.FAST]
