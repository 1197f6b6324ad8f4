"""A bit flipped in any object of a checkpoint of many ranks: a restore on another layout raises, or restores the same values."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import CheckpointError, CorruptCheckpointError
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from tests.distributed import programs
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(not programs.TRAINS_FSDP2, reason="FSDP2 of this torch does not train on a CPU")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, dict[str, torch.Tensor]]:
    """Of HSDP: parts of two ranks, in equal shares of four."""
    url = f"{tmp_path_factory.mktemp('saved')}/run"
    run_ranks(4, programs.save_whole, url, "hsdp")
    return copied(LocalStore(url)), torch.load(f"{url}.pt")


def copied(store: Any) -> MemoryStore:
    made = MemoryStore()
    for info in store.list(""):
        made.put(info.key, store.get(info.key))
    return made


def restored(store: MemoryStore, which: Any = "latest") -> dict[str, torch.Tensor]:
    """Into one process, which has nothing to do with others. Raises what the restore raises."""
    model = programs.Net()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState()}
    generators = torch.get_rng_state()
    with fastckpt.Checkpointer(store, state, read_only=True, reassign=lambda *_: None) as ckpt:
        ckpt.restore(which)
    assert torch.equal(generators, torch.get_rng_state()), "they stay as they are"
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, one in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": tensor for name, tensor in one.items()}
    return found


def test_whole(saved: tuple[MemoryStore, dict[str, torch.Tensor]]) -> None:
    store, expected = saved
    found = restored(store)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_flipped_bits(saved: tuple[MemoryStore, dict[str, torch.Tensor]]) -> None:
    """Six of each of the votes, packs and records: 100 restores, some 8 s."""
    store, expected = saved
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    raised = 0
    for info in list(store.list("")):
        if info.key == "README.txt":
            continue
        for _ in range(6):
            spoilt = copied(store)
            data = bytearray(store.get(info.key))
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            spoilt.put(info.key, bytes(data))
            try:
                found = restored(spoilt)
            except CheckpointError:
                raised += 1
                continue
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), info.key
    assert raised > 30


@pytest.mark.parametrize("kind", ["votes/", "data/"])
def test_an_object_that_is_gone_is_named(saved: tuple[MemoryStore, dict[str, torch.Tensor]], kind: str) -> None:
    store, _ = saved
    for info in list(store.list(kind)):
        spoilt = copied(store)
        spoilt.delete(info.key)
        with pytest.raises(CorruptCheckpointError) as error:
            restored(spoilt)
        assert info.key.rpartition("/")[2] in str(error.value) or info.key in str(error.value)
        with pytest.raises(CheckpointError):  # there is no other one
            restored(spoilt, "latest-valid")
