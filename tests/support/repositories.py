"""Small repositories for tests: made by one process, or by one that plays several ranks; how they are damaged, and looked at."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastckpt import Checkpointer, Options
from fastckpt.errors import CorruptCheckpointError
from fastckpt.format import container, directory
from fastckpt.format.container import READ_SHARED
from fastckpt.format.directory import Share
from fastckpt.format.keys import CheckpointId, SaveId, VoteName, vote_key
from fastckpt.format.repository_records import Commit, Epoch, Parent, parent_to_json
from fastckpt.format.shares import first_entries, shared_numbers
from fastckpt.format.tensor_names import dotted
from fastckpt.format.vote import Vote, vote_name
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.repository.catalog import Catalog, open_checked
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.state import Captured
from fastckpt.state.sealing import seal
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.container import index_and_footer
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload
from tests.support.states import captured, rich_state, sealed

OPTIONS = Options(threads=1, connections=1, host_budget_bytes=256 << 20)
"""Nothing at the same time, which makes the order of requests that of the calls."""
IN_PARALLEL = Options(threads=2, connections=2)


def incarnation(store: Store) -> Incarnation:
    return Incarnation(Repository(store), OPTIONS)


def read(store: Store, commit: Commit, rank: int = 0) -> Any:
    """The object of a checkpoint, every byte verified."""
    return load(open_rank(store, commit, rank))


def load(reader: Reader) -> Any:
    """The object of an index that was read."""
    return load_object(reader, OPTIONS, 1, map_location=None, pickle_module=pickle, weights_only=True, load_args={})


def save_steps(
    store: Store, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]] | None = None
) -> Incarnation:
    """One incarnation's saves of rich_state(step)."""
    job = Incarnation(Repository(store), IN_PARALLEL)
    job.choose_and_claim()
    for step in steps:
        job.save(sealed(rich_state(step)), SaveAsked(step, metrics=(metrics or {}).get(step, {})))
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
    return upload(sealed(obj), store, request, IN_PARALLEL).vote


def shared(obj: Any, rank: int, shares: Mapping[str, Sequence[tuple[int, int]]]) -> Captured:
    """A rank's state, of which tensors of these (dotted) first names are shared out."""
    found = captured(obj)
    found.rank = rank
    for number, first in first_entries(found.tensors).items():
        name = dotted(first.name)
        if name in shares:
            found.shares[number] = tuple(Share(*one) for one in shares[name])
    return found


def vote_shared(store: Store, epoch: int, step: int, world: int, state: Captured) -> Vote:
    """A rank's part of a save, of a state that `shared` has made."""
    save = SaveId(epoch, step, 0)
    request = SaveRequest(asked=SaveAsked(step), save=save, parent=None, rank=state.rank, world=world)
    return upload(seal(state), store, request, IN_PARALLEL).vote


def save_shared(store: Store, epoch: int, step: int, states: Sequence[Captured]) -> Commit:
    """A whole save of ranks that share what they hold alike."""
    for state in states:
        vote_shared(store, epoch, step, len(states), state)
    commit = try_commit(store, SaveId(epoch, step, 0))
    assert commit is not None
    return commit


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
    header = container.build_header(READ_SHARED if shared_numbers(listed.storages) else 0)
    files = directory.build_file_table(reader.files)
    parts = [directory.build(listed), files, reader.records.tobytes(), reader.skeleton]
    data = b"".join([header, *index_and_footer(header, 0, parts)])
    name = vote_name(save, rank, world, data)
    store.put(vote_key(name), data)
    return name


def reuse(store: Store, old: int, new: int, epoch: int = 1) -> Commit:
    """A checkpoint whose vote names only packs of an earlier one."""
    save = SaveId(epoch, new, 0)
    parent = commit_of(store, old, epoch)
    place_vote(store, save, open_vote(store, parent.vote(0)), parent=as_parent(parent))
    commit = try_commit(store, save)
    assert commit is not None
    return commit


def as_parent(commit: Commit) -> dict[str, Any] | None:
    """What a vote says of the checkpoint that it continues from."""
    return parent_to_json(Parent(commit.checkpoint, commit.digest))


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


def living(store: Store) -> dict[CheckpointId, Commit]:
    """All living checkpoints, in the history or not. Raises for one that cannot be read."""
    repository = Repository(store)
    found = repository.read_all(repository.list())
    assert not found.failed, found.failed
    return found.commits


def history(store: Store) -> list[CheckpointId]:
    return list(Catalog(Repository(store)).history())


def check_all(store: Store) -> None:
    """G1: whatever is committed is whole, to the last bit."""
    for commit in living(store).values():
        open_checked(store, commit)
        for rank in range(commit.world):
            reader = open_vote(store, commit.vote(rank))
            for number in range(len(reader.records)):
                out = np.empty(int(reader.records["raw_bytes"][number]), np.uint8)
                damage = reader.read_chunk(number, out)
                if damage is not None:
                    raise CorruptCheckpointError(commit.checkpoint.__str__(), [damage])


def saved_once(state: dict[str, Any]) -> MemoryStore:
    """A repository with step 1 of a state."""
    store = MemoryStore()
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    return store


def restore_once(store: MemoryStore, state: dict[str, Any]) -> None:
    """Step 1 into the objects of a state."""
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1
