"""The native module itself: how it is loaded, and that neither interpreters nor threads share what they write to."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastckpt.kernels.transform import Transform

_native: Any = pytest.importorskip("fastckpt._native", reason="no native kernels: there was no compiler")


def loaded_again() -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("fastckpt._native", _native.__file__)
    spec = importlib.util.spec_from_loader("fastckpt._native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_each_load_makes_a_module_of_its_own() -> None:
    """Multi-phase initialisation: a single-phase module would be handed out a second time, with what others did to it."""
    first, second = loaded_again(), loaded_again()
    assert first is not second
    first.crc64nvme = None  # type: ignore[attr-defined]
    assert second.crc64nvme(b"123456789") == 0xAE8B14860A799888


def test_threads_encode_and_decode_at_once() -> None:
    """Each has a context of its own: with one between them, tables and planes would be mixed up."""
    found: list[bool] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        good = True
        for _ in range(6):
            raw = (rng.standard_normal(50_000) * 10.0**seed).astype(np.float32).view(np.uint8)
            base = raw.copy()
            base[:: 4 * (seed + 1)] ^= 1
            for transform, pack_bits in ((Transform.ROT, 0), (Transform.SUB, 0), (Transform.SUBPACK, 2)):
                room, back = np.empty(2 * raw.size + 2048, np.uint8), np.empty_like(raw)
                n, _, digest = _native.encode(raw, base, transform, 4, pack_bits, room)
                good &= _native.decode(room[:n].copy(), base, transform, 4, pack_bits, back) == digest
                good &= bool((back == raw).all())
        found.append(good)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
