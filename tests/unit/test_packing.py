"""Chunks are encoded in the memory of packs: nothing is stored twice, and each pack's checksum is known before it is put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import codec, events
from fastckpt.errors import SaveError, StoreUnavailableError
from fastckpt.format import keys
from fastckpt.kernels.checksums import crc64nvme, digest
from fastckpt.store.body import Body, known_crc64nvme
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.pack_buffers import PackBuffers
from fastckpt.writing.packs import Pack
from tests.support.repositories import check_all

MIB = 1 << 20
THREADS = fastckpt.Options(threads=4, connections=3, host_budget_bytes=256 * MIB)


class Watching(MemoryStore):
    """Notes what is put into packs."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, int | None] = {}

    def put(self, key: str, data: Any) -> None:
        if key.startswith(keys.DATA):
            self.known[key] = known_crc64nvme(data)
        super().put(key, data)


def noise(seed: int, n_bytes: int = 4 * MIB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n_bytes,), generator=generator, dtype=torch.uint8)


def test_equal_chunks_are_stored_once_whoever_is_faster() -> None:
    store = Watching()
    state = {f"w{i}": noise(i % 3) for i in range(12)}
    with fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=THREADS) as ckpt:
        ckpt.save_now(1).wait()
    stored = sum(info.n_bytes for info in store.list(keys.DATA))
    assert stored == 3 * 4 * MIB
    check_all(store)


def test_the_checksum_of_a_pack_comes_from_its_chunks() -> None:
    store = Watching()
    state = {f"w{i}": torch.randn(300_000 + i, generator=torch.Generator().manual_seed(i)) for i in range(20)}
    with fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=THREADS) as ckpt:
        ckpt.save_now(1).wait()
    assert len(store.known) > 1
    for key, known in store.known.items():
        assert known == crc64nvme(store.get(key))
    check_all(store)


def test_what_stores_nothing_makes_no_pack() -> None:
    store = Watching()
    state = {"zeros": torch.zeros(3 * MIB), "ones": torch.ones(3 * MIB)}
    with fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=THREADS) as ckpt:
        ckpt.save_now(1).wait()
    assert not store.known
    check_all(store)


def test_events_say_what_became_of_each_chunk() -> None:
    seen: list[events.Event] = []
    state = {f"w{i}": noise(i % 2) for i in range(6)}
    store = MemoryStore()
    with (
        fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=THREADS) as ckpt,
        events.subscribe(seen.append),
    ):
        ckpt.save_now(1).wait()
    stored = [event for event in seen if isinstance(event, events.ChunkStored)]
    encoded = [event for event in seen if isinstance(event, events.ChunkEncoded)]
    assert sorted(event.record for event in stored) == sorted(event.record for event in encoded)
    assert sum(event.stored_bytes for event in stored) == sum(info.n_bytes for info in store.list(keys.DATA))


def test_an_error_of_one_upload_ends_the_save_and_the_next_one_is_made() -> None:
    class Breaking(MemoryStore):
        left = 2

        def put(self, key: str, data: Any) -> None:
            if key.startswith(keys.DATA):
                self.left -= 1
                if not self.left:
                    raise StoreUnavailableError("as the test wants it")
            super().put(key, data)

    store = Breaking()
    state = {f"w{i}": noise(i) for i in range(12)}
    with fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=THREADS) as ckpt:
        with pytest.raises(StoreUnavailableError):
            ckpt.save_now(1).wait()
        with pytest.raises(StoreUnavailableError):
            ckpt.step(1)
        ckpt.save_now(2).wait()
    check_all(store)


def test_a_cancelled_save_ends() -> None:
    class Cancelling(MemoryStore):
        ckpt: Any = None

        def put(self, key: str, data: Any) -> None:
            super().put(key, data)
            if key.startswith(keys.DATA):
                self.ckpt._engine.queue.cancel()

    store = Cancelling()
    state = {f"w{i}": noise(i) for i in range(12)}
    with fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=THREADS) as ckpt:
        store.ckpt = ckpt
        handle = ckpt.save_now(1)
        with pytest.raises(SaveError, match="cancelled"):
            handle.wait()
        with pytest.raises(SaveError, match="cancelled"):
            ckpt.step(1)


def test_a_part_of_a_body_has_no_checksum() -> None:
    body = Body.of(np.arange(10, dtype=np.uint8), 7)
    assert known_crc64nvme(body) == 7
    assert known_crc64nvme(body[:9]) is None
    assert known_crc64nvme(body.copy()) is None
    assert known_crc64nvme(body.data) is None
    assert bytes(body) == bytes(range(10))


def test_a_pack_is_filled_from_its_beginning() -> None:
    pack = Pack(np.zeros(100, np.uint8), 60)
    data = np.frombuffer(bytes(range(50)), np.uint8)
    pack.rest[:30] = data[:30]
    assert pack.keep(30, crc64nvme(data[:30])) == 0
    pack.rest[:20] = data[30:]
    assert pack.keep(20, crc64nvme(data[30:])) == 30
    assert (pack.n_bytes, pack.room) == (50, 10)
    assert pack.crc64nvme == crc64nvme(pack.buffer[:50]) == crc64nvme(data)


def test_buffers_are_kept_from_save_to_save() -> None:
    buffers = PackBuffers()
    buffers.begin(8 * MIB, 3)
    taken = [buffers.take(9) for _ in range(3)]
    assert all(one is not None for one in taken)
    assert buffers.take(9) is None
    for one in taken:
        assert one is not None
        buffers.give_back(one)
    buffers.begin(6 * MIB, 2)
    assert buffers.take(1) is taken[1], "of a size that fits; no more than are needed are kept"
    assert buffers.take(1) is None, "one at once"
    buffers.begin(1 * MIB, 2)
    found = buffers.take(2)
    assert found is not None
    assert found.size == MIB, "larger ones were freed"


@pytest.mark.parametrize("effort", codec.Effort)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_encoded_in_place_are_the_same_bytes(
    effort: codec.Effort, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCKPT_KERNELS", kernels)
    numbers = np.random.default_rng(3).standard_normal(30_000).astype(np.float32)
    sparse = np.where(np.arange(30_000) % 50, np.float32(0), numbers)
    for raw, lane in ((numbers.view(np.uint8), 4), (sparse.view(np.uint8), 4), (numbers.view(np.uint8)[:100], 0)):
        expected = codec.encode(raw, 4, lane, effort=effort)
        out = np.zeros(raw.size + 8, np.uint8)
        found = codec.encode_into(raw, 4, lane, out, effort=effort)
        n = len(expected.stored)
        assert bytes(out[:n]) == bytes(expected.stored) == bytes(found.stored)
        assert (found.transform, found.digest, found.crc64nvme) == (
            expected.transform,
            digest(raw),
            expected.crc64nvme,
        )
        assert not out[raw.size :].any()


@pytest.mark.parametrize("effort", ["none", "fast", "normal", "high"])
def test_events_say_which_effort_was_used(effort: str) -> None:
    seen: list[events.Event] = []
    state = {"w": torch.randn(3 * MIB, generator=torch.Generator().manual_seed(1))}
    options = fastckpt.Options(threads=2, connections=2, effort=effort)
    with (
        fastckpt.Checkpointer(MemoryStore(), {"s": state}, every=None, spot=None, options=options) as ckpt,
        events.subscribe(seen.append),
    ):
        ckpt.save_now(1).wait()
    encoded = [event for event in seen if isinstance(event, events.ChunkEncoded)]
    (used,) = (event for event in seen if isinstance(event, events.EffortUsed))
    assert {event.effort for event in encoded} == {used.effort} == {effort}
    assert (used.chunks, used.step, used.why) == (len(encoded), 1, "as the options say")
    assert used.raw_bytes == sum(event.raw_bytes for event in encoded)
    assert used.stored_bytes == sum(event.stored_bytes for event in encoded)
    assert (used.stored_bytes < used.raw_bytes) == (effort != "none")


def test_a_file_is_written_with_normal_effort_or_as_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state, lengths = {"w": torch.randn(MIB, generator=torch.Generator().manual_seed(1))}, {}
    for effort in ("auto", "normal", "none"):
        monkeypatch.setenv("FASTCKPT_EFFORT", effort)
        fastckpt.save(state, tmp_path / effort)
        lengths[effort] = (tmp_path / effort).stat().st_size
    assert lengths["auto"] == lengths["normal"] < lengths["none"]
