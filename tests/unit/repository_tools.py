"""Small repositories for tests: made by one process, or by one that plays several ranks; and how they are damaged."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastckpt.format import container, directory
from fastckpt.format.keys import CheckpointId, SaveId, VoteName, vote_key
from fastckpt.format.repository_records import Commit, Epoch, Parent
from fastckpt.format.vote import Vote, vote_name
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.state import Captured, capture
from fastckpt.store.base import Store
from fastckpt.writing.container import index_and_footer
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload

OPTIONS = Options(threads=2, connections=2)


def state(seed: int, n: int = 300_000) -> dict[str, Any]:
    """Big and small tensors, a view, an array, a newer element type, Python state: 1.9 MB for the default n."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator)
    return {
        "model": {"weight": weight, "bias": torch.randn(7, generator=generator), "view": weight[10:20]},
        "optim": {"state": {0: {"step": torch.tensor(float(seed)), "exp_avg": torch.zeros(n)}}, "lr": 0.1},
        "ids": torch.arange(seed, seed + 11),
        "array": np.arange(20_000, dtype=np.float64) + seed,
        "wide": torch.arange(5, dtype=torch.int32).to(torch.uint16),
        "empty": torch.empty(0, 3),
        "note": f"seed {seed}",
    }


def captured(obj: Any) -> Captured:
    return capture(obj, pickle, 2)


def save_steps(
    store: Store, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]] | None = None
) -> Incarnation:
    """One incarnation's saves of state(step)."""
    job = Incarnation(Repository(store), OPTIONS)
    job.restore()
    for step in steps:
        job.save(captured(state(step)), SaveAsked(step, metrics=(metrics or {}).get(step, {})))
    return job


def begin(store: Store, world: int, parent: Commit | None = None, *, rewind: bool = False) -> Epoch:
    repository = Repository(store)
    repository.initialise()
    return repository.claim(
        None if parent is None else Parent(parent.checkpoint, parent.digest), world=world, rewind=rewind
    )


def vote(
    store: Store, epoch: int, step: int, rank: int, world: int, obj: Any, parent: Commit | None = None, attempt: int = 0
) -> Vote:
    """One rank's part of a save: packs and vote."""
    of = None if parent is None else Parent(parent.checkpoint, parent.digest)
    request = SaveRequest(asked=SaveAsked(step), save=SaveId(epoch, step, attempt), parent=of, rank=rank, world=world)
    return upload(captured(obj), store, request, OPTIONS)


def save_ranks(store: Store, epoch: int, step: int, states: Sequence[Any], parent: Commit | None = None) -> Commit:
    """A whole save of several ranks."""
    for rank, obj in enumerate(states):
        vote(store, epoch, step, rank, len(states), obj, parent)
    commit = try_commit(store, SaveId(epoch, step, 0))
    assert commit is not None
    return commit


def place_vote(
    store: Store, save: SaveId, reader: Reader, *, rank: int = 0, world: int = 1, **changes: Any
) -> VoteName:
    """The index of another save as the vote of this one: all its packs are that save's. changes: members of `save`."""
    info = {**(reader.directory.save or {}), "epoch": save.epoch, "try": save.attempt, "stored_bytes": 0, **changes}
    listed = replace(reader.directory, step=save.step, rank=rank, world=world, save=info)
    header = container.build_header(read_features=0)
    files = directory.build_file_table(reader.files)
    parts = [directory.build(listed), files, reader.records.tobytes(), reader.skeleton]
    data = b"".join([header, *index_and_footer(header, 0, parts)])
    name = vote_name(save, rank, world, data)
    store.put(vote_key(name), data)
    return name


def reuse(store: Store, old: int, new: int, epoch: int = 1) -> Commit:
    """A checkpoint whose vote names only packs of an earlier one."""
    save = SaveId(epoch, new, 0)
    place_vote(store, save, open_vote(store, commit_of(store, old, epoch).vote(0)), parent=None)
    commit = try_commit(store, save)
    assert commit is not None
    return commit


def commit_of(store: Store, step: int, epoch: int = 1) -> Commit:
    found = Repository(store).commit(CheckpointId(epoch, step))
    assert isinstance(found, Commit)
    return found


def keys_of(store: Store, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def flip(store: Store, key: str, at: int | None = None) -> None:
    """One bit; by default in the middle."""
    data = bytearray(store.get(key))
    data[len(data) // 2 if at is None else at] ^= 1
    store.put(key, data)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, shapes, types and structure too."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        if (a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()):
            return False
        return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)
