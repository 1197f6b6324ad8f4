"""What can still be read of a damaged checkpoint: every tensor that verifies, and for each that does not, where an older one is.

    votes (by the commit record, or by listing) ─→ every chunk read once ─→ good tensors → container, lost ones → report

Two passes over the packs: the first finds out what is good, the second writes it. So no tensor is ever in memory as a whole, however
large: the container is made by `save.write` from storages whose bytes are read when they are cut.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.storage import UntypedStorage

from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    Damage,
    NoCheckpointError,
    ObjectNotFoundError,
    RepositoryError,
    StoreError,
    UnsupportedFormatError,
)
from fastckpt.format import container, keys, records
from fastckpt.format.container import FOOTER_BYTES, INDEX_PARTS
from fastckpt.format.digest import digest
from fastckpt.format.directory import GlobalPlace, TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.format.repository_records import Commit, Tombstone
from fastckpt.format.tensor_names import Name, dotted, to_json
from fastckpt.host.files import AtomicFile
from fastckpt.host.sink import committing
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import MAX_RAW_BYTES, transform_name
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource, ObjectSource
from fastckpt.reading.storage_loader import check_size
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import MAX_VOTE_BYTES, complete_set, open_vote
from fastckpt.repository.repository import Repository
from fastckpt.state import capture
from fastckpt.store.base import Store
from fastckpt.writing.background import write_now
from fastckpt.writing.container import index_and_footer

U8 = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]

_CACHED_CHUNKS = 16  # of at most 4 MiB: new bundles of small tensors take their pieces from several old ones in turn


@dataclass(frozen=True)
class FoundIn:
    """Where a tensor of the same name, shape and type lies whole."""

    checkpoint: CheckpointId
    rank: int


@dataclass
class LostTensor:
    """A tensor that could not be read."""

    name: Name
    dtype: str
    shape: tuple[int, ...]
    why: tuple[str, ...]
    found_in: FoundIn | None = None
    """The newest living checkpoint, history first, that has it; None: there is none."""
    assumed: bool = False
    """The index is lost: that there was such a tensor follows from another checkpoint."""
    place: GlobalPlace | None = None


@dataclass
class SalvagedRank:
    """What became of one rank."""

    rank: int
    file: str | None = None
    """The container with what was saved; None: there was nothing."""
    saved: list[str] = field(default_factory=list)
    """Keys of the dictionary in `file`: dotted names, with #2 … behind those that look alike."""
    saved_bytes: int = 0
    lost: list[LostTensor] = field(default_factory=list)
    lost_whole: bool = False
    """The rank's index is lost, and with it everything."""
    object_whole: bool = True
    """Whether the pickled object around the tensors (Python state) is undamaged; it is not part of `file`."""
    notes: list[str] = field(default_factory=list)


@dataclass
class SalvageReport:
    """What `salvage` did. `nothing_lost`: all tensors of all ranks asked for were written."""

    url: str
    checkpoint: CheckpointId
    attempt: int
    world: int
    commit: str
    """"whole", or what is wrong with the commit record."""
    ranks: list[SalvagedRank] = field(default_factory=list)

    @property
    def nothing_lost(self) -> bool:
        return not any(rank.lost or rank.lost_whole or not rank.object_whole for rank in self.ranks)

    @property
    def lost(self) -> list[tuple[int, LostTensor]]:
        """(rank, tensor) of all that is lost."""
        return [(rank.rank, tensor) for rank in self.ranks for tensor in rank.lost]


@dataclass(frozen=True)
class Votes:
    """The votes that make up a checkpoint, as far as they are known."""

    save: SaveId
    world: int
    names: Mapping[int, VoteName]
    commit: str = "whole"


def salvage(
    repository: Repository,
    checkpoint: CheckpointId,
    directory: str,
    *,
    ranks: Sequence[int] | None = None,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> SalvageReport:
    """Write `directory`/rank-00000.fckpt … and `directory`/report.json; files of these names are replaced. Changes no repository.

    ranks: None for all. Each file is a container of {dotted name: tensor}. progress: called with chunks done and in all, anew
    for each rank. Takes 12 MiB for each of `options.threads` and 64 MiB more, and the index of one rank.
    `options.max_load_bytes` bounds what one rank may unpack to.

    Damage is reported, never raised. NoCheckpointError: nothing is left of it, or it was retired; TooLargeError; StoreError other than
    for a missing object; OSError, SaveError for the directory.
    """
    options = options or Options()
    votes = find_votes(repository, checkpoint)
    wanted = range(votes.world) if ranks is None else ranks
    if any(not 0 <= rank < votes.world for rank in wanted):
        raise NoCheckpointError(
            f"{repository.location(checkpoint)} has ranks 0 to {votes.world - 1}: asked for {list(wanted)}"
        )
    os.makedirs(directory, exist_ok=True)
    report = SalvageReport(repository.url, checkpoint, votes.save.attempt, votes.world, votes.commit)
    elsewhere = _Elsewhere(repository, checkpoint, votes.world, options)
    for rank in wanted:
        path = os.path.join(directory, f"rank-{rank:05}.fckpt")
        report.ranks.append(_salvage_rank(repository.store, votes, rank, path, elsewhere, options, progress))
    _write_json(os.path.join(directory, "report.json"), report_to_json(report))
    return report


# Finding the votes.


def find_votes(repository: Repository, checkpoint: CheckpointId) -> Votes:
    """By the commit record; where that is damaged or missing, by listing. NoCheckpointError if there is nothing."""
    try:
        found = repository.commit(checkpoint)
    except ObjectNotFoundError:
        words = "missing: this save was never completed, so it is no checkpoint"
    except (StoreError, UnsupportedFormatError):
        raise
    except CorruptCheckpointError as error:
        words = "; ".join(map(str, error.damage))
    else:
        if isinstance(found, Tombstone):
            raise NoCheckpointError(
                f"{repository.location(checkpoint)}: this checkpoint was retired ({found.why}), its data is being deleted. "
                "`fastckpt ls` lists those that are left"
            )
        return Votes(found.save, found.world, {rank: found.vote(rank) for rank in range(found.world)})
    listed = (keys.parse_vote(info.key) for info in repository.store.list(keys.VOTES))
    votes = choose_try([name for name in listed if name is not None and name.save.checkpoint == checkpoint], words)
    if votes is None:
        raise NoCheckpointError(
            f"{repository.url}: nothing is left of epoch {checkpoint.epoch}, step {checkpoint.step}: its commit record is "
            f"{words.partition(':')[0]} and it has no votes. `fastckpt ls` lists what is here"
        )
    return votes


def choose_try(names: Iterable[VoteName], commit: str) -> Votes | None:
    """Which try's votes to believe without a commit record: a complete one, the first of several. Else the one with the most ranks."""
    tries: dict[SaveId, list[VoteName]] = defaultdict(list)
    for name in names:
        tries[name.save].append(name)
    best: tuple[bool, int, int] | None = None
    chosen = None
    for save, found in tries.items():
        rank = (_complete(found), len({name.rank for name in found}), -save.attempt)
        if best is None or rank > best:
            best, chosen = rank, save
    if chosen is None:
        return None
    votes = sorted(tries[chosen], reverse=True)
    return Votes(chosen, max(vote.world for vote in votes), {vote.rank: vote for vote in votes}, commit)


def _complete(names: Sequence[VoteName]) -> bool:
    try:
        return complete_set(names, "") is not None
    except RepositoryError:
        return False


@dataclass
class _Opened:
    """A rank's index, or why there is none."""

    reader: Reader | None
    why: tuple[str, ...] = ()


def _open(store: Store, name: VoteName | None) -> _Opened:
    """A vote, if need be without its skeleton: each part has a digest of its own."""
    if name is None:
        return _Opened(None, ("this rank has not voted",))
    try:
        return _Opened(open_vote(store, name))
    except ObjectNotFoundError:
        return _Opened(None, (f"its vote is missing: {keys.vote_key(name)}",))
    except UnsupportedFormatError as error:
        return _Opened(None, (str(error),))
    except CorruptCheckpointError as error:
        why = tuple(f"its vote is damaged: {damage}" for damage in error.damage)
    try:
        return _Opened(_without_skeleton(store, name), why)
    except (CheckpointError, EOFError) as error:
        if isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError):
            raise
        return _Opened(None, why)


def _without_skeleton(store: Store, name: VoteName) -> Reader:
    """A damaged vote whose directory, file table and records are as their digests say."""
    key = keys.vote_key(name)
    source = f"{store.url}/{key}"
    if not container.MIN_BYTES <= store.head(key).n_bytes <= MAX_VOTE_BYTES:
        raise CorruptCheckpointError(source, [Damage("vote", "length", f"{name.n_bytes} bytes", "another length")])
    data = store.get(key)
    footer = container.parse_footer(data[-FOOTER_BYTES:], len(data), source)
    parts = []
    for part in INDEX_PARTS[:-1]:
        entry = footer.parts[part]
        # From the end: the footer may belong to a container that is shorter than the object.
        start = len(data) - footer.container_bytes + entry.offset
        found = data[start : start + entry.n_bytes]
        if digest(found) != entry.digest:
            raise CorruptCheckpointError(source, [Damage(part, "digest", entry.digest.hex(), digest(found).hex())])
        parts.append(found)
    whole = footer.header_bytes + b"".join(index_and_footer(footer.header_bytes, 0, [*parts, b""]))
    return Reader.open_vote(BytesSource(whole, source), lambda file: ObjectSource(store, file.key, file.n_bytes))


# One rank.


def _salvage_rank(
    store: Store,
    votes: Votes,
    rank: int,
    path: str,
    elsewhere: _Elsewhere,
    options: Options,
    progress: Progress,
) -> SalvagedRank:
    result = SalvagedRank(rank)
    opened = _open(store, votes.names.get(rank))
    reader = opened.reader
    if reader is None:
        result.lost_whole, result.object_whole = True, False
        result.notes += opened.why
        result.lost = elsewhere.expected(rank, opened.why)
    else:
        if opened.why:
            result.object_whole = False
            result.notes += opened.why
        bad = verify(reader, range(len(reader.records)), options.threads, progress)
        problems = _problems(reader, bad)
        good = []
        for entry in reader.directory.tensors:
            why = problems.get(entry.storage) or _cannot_write(reader, entry)
            if why:
                lost = LostTensor(entry.name, entry.dtype, entry.shape, why, place=entry.place)
                result.lost.append(lost)
            else:
                good.append(entry)
        nameless = problems.keys() - {entry.storage for entry in reader.directory.tensors}
        if nameless:
            result.object_whole = False
            result.notes.append(f"{len(nameless)} storages that belong to no named tensor are damaged")
        if good:
            _write_tensors(reader, good, path, result, options)
    elsewhere.find(rank, result.lost)
    return result


def verify(
    reader: Reader, numbers: Sequence[int], threads: int, progress: Progress = lambda done, total: None
) -> dict[int, Damage]:
    """Read and decode chunks, on several threads. Returns what is wrong with those that are damaged or missing."""
    unread = set(records.unsupported(reader.records))
    bad: dict[int, Damage] = {}
    lock, stop, done = threading.Lock(), threading.Event(), 0

    def work(some: npt.NDArray[np.int64]) -> None:
        nonlocal done
        out = np.empty(MAX_RAW_BYTES, np.uint8)
        for number in some.tolist():
            if stop.is_set():
                return
            if number in unread:
                name = transform_name(int(reader.records["transform"][number]))
                found: Damage | None = Damage("payload", f"chunk {number}", "a transform known here", name)
            else:
                found = reader.read_chunk(number, out[: int(reader.records["raw_bytes"][number])])
            with lock:
                if found is not None:
                    bad[number] = found
                done += 1
                progress(done, len(numbers))

    slices = np.array_split(np.array(numbers, np.int64), max(1, min(threads, len(numbers))))
    pool = WorkerPool(len(slices), "fastckpt-salvage")
    try:
        for future in [pool.submit(lambda some=some: work(some)) for some in slices]:  # type: ignore[misc]
            future.result()
    finally:
        stop.set()
        pool.close()
    return bad


def _problems(reader: Reader, bad: Mapping[int, Damage]) -> dict[int, tuple[str, ...]]:
    """Storage → what is wrong with its chunks."""
    found = {}
    for number in range(len(reader.directory.storages)):
        wrong = [bad[record] for record, *_ in reader.pieces(number) if record in bad] if bad else []
        if wrong:
            texts = [f"{d.place}: expected {d.expected}, found {d.found}" for d in wrong]
            found[number] = tuple(dict.fromkeys(texts))
    return found


def _cannot_write(reader: Reader, entry: TensorEntry) -> tuple[str, ...]:
    """Why a tensor whose bytes are right cannot be written as one."""
    if entry.kind == "quantized":
        return ("its bytes are right, but its scales are in the pickled object: load that with fastckpt restore",)
    storage = reader.directory.storages[entry.storage]
    if entry.dtype.startswith(NUMPY_PREFIX):
        n_bytes = int(np.prod(entry.shape, dtype=object)) * np.dtype(entry.dtype.removeprefix(NUMPY_PREFIX)).itemsize
        if entry.offset or n_bytes != storage.n_bytes or _order(entry) is None:
            return ("its bytes are right, but no writer of fastckpt lays out an array like this",)
        return ()
    try:
        torch.empty_strided(entry.shape, entry.stride, dtype=getattr(torch, entry.dtype), device="meta")
    except (RuntimeError, ValueError, OverflowError, AttributeError, TypeError) as error:
        return (f"its bytes are right, but torch cannot make it: {error}",)
    return ()


def _order(entry: TensorEntry) -> str | None:
    """C or F, if the array is contiguous."""
    for order in ("C", "F"):
        sizes = entry.shape if order == "F" else entry.shape[::-1]
        expected, step = [], 1
        for size in sizes:
            expected.append(step)
            step *= max(size, 1)
        if list(entry.stride if order == "F" else entry.stride[::-1]) == expected:
            return order
    return None


# Writing what is good.


class _Chunks:
    """Decoded chunks of a reader, the last few kept. Any thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._kept: OrderedDict[int, U8] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> U8:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        out = np.empty(int(self._reader.records["raw_bytes"][number]), np.uint8)
        damage = self._reader.read_chunk(number, out)
        if damage is not None:  # it was right a moment ago
            raise CorruptCheckpointError(self._reader.source.name, [damage], "Run `fastckpt salvage` once more")
        with self._lock:
            self._kept[number] = out
            if len(self._kept) > _CACHED_CHUNKS:
                self._kept.popitem(last=False)
        return out


class _Stored:
    """A storage whose bytes stay in their packs until they are written."""

    def __init__(self, chunks: _Chunks, reader: Reader, number: int) -> None:
        self._chunks = chunks
        self._pieces = list(reader.pieces(number))
        self._starts = [position for _, _, position, _ in self._pieces]

    def read_into(self, offset: int, out: U8) -> None:
        """Any thread. CorruptCheckpointError, StoreError."""
        done = 0
        while done < out.size:
            record, first, position, n_bytes = self._pieces[bisect_right(self._starts, offset + done) - 1]
            skip = offset + done - position
            n = min(n_bytes - skip, out.size - done)
            out[done : done + n] = self._chunks.get(record)[first + skip : first + skip + n]
            done += n


def _write_tensors(
    reader: Reader, good: Sequence[TensorEntry], path: str, result: SalvagedRank, options: Options
) -> None:
    """{dotted name: tensor} as a container. The tensors that are pickled are shapes over memory that nobody ever touches."""
    storages = {entry.storage for entry in good}
    n_bytes = sum(reader.directory.storages[n].n_bytes for n in storages if _has_data(reader, n))
    check_size(reader, n_bytes, options.max_load_bytes)
    chunks = _Chunks(reader)
    shells = _Shells(reader, chunks)
    state: dict[str, Any] = {}
    for entry in good:
        state[_unused(dotted(entry.name), state)] = shells.make(entry)
    captured = capture(state, pickle, 2)
    for i, address in enumerate(captured.addresses):
        number = shells.number_at.get(address)
        if number is not None:
            captured.elsewhere[i] = _Stored(chunks, reader, number)
    write_now(captured, AtomicFile(path), path, options, 0.0)
    result.file, result.saved, result.saved_bytes = path, list(state), captured.n_bytes


def _has_data(reader: Reader, number: int) -> bool:
    return reader.directory.storages[number].extents is not None


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or with #2, #3, … where another tensor's looks the same."""
    unused, n = name, 2
    while unused in taken:
        unused, n = f"{name}#{n}", n + 1
    return unused


class _Shells:
    """Tensors and arrays of the right shape over memory that is reserved but never touched, so that it takes no room."""

    def __init__(self, reader: Reader, chunks: _Chunks) -> None:
        self._reader = reader
        self._chunks = chunks
        self._storages: dict[tuple[int, str], UntypedStorage] = {}
        self.number_at: dict[int, int] = {}
        """Address of a shell → storage it stands for."""

    def make(self, entry: TensorEntry) -> Any:
        if entry.dtype.startswith(NUMPY_PREFIX):
            return self._array(entry)
        dtype = getattr(torch, entry.dtype)
        if not _has_data(self._reader, entry.storage):
            return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
        # One for each element type: pickling refuses several views of one memory that differ in it.
        storage = self._storages.get((entry.storage, entry.dtype))
        if storage is None:
            storage = self._storages[entry.storage, entry.dtype] = self._reserve(entry.storage)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, entry.offset, entry.shape, entry.stride)

    def _reserve(self, number: int) -> UntypedStorage:
        n_bytes = self._reader.directory.storages[number].n_bytes
        if not n_bytes:
            return UntypedStorage(0)
        room = np.empty(n_bytes, np.uint8)
        self.number_at[room.ctypes.data] = number
        return torch.from_numpy(room).untyped_storage()

    def _array(self, entry: TensorEntry) -> Any:
        dtype = np.dtype(entry.dtype.removeprefix(NUMPY_PREFIX))
        array = np.empty(entry.shape, dtype, "F" if _order(entry) == "F" else "C")
        # Small arrays are pickled with their bytes, so those must be there.
        flat = array.reshape(-1, order="A").view(np.uint8)
        if array.nbytes <= 1 << 20:
            _Stored(self._chunks, self._reader, entry.storage).read_into(0, flat)
        else:
            self.number_at[array.ctypes.data] = entry.storage
        return array


# Where else a lost tensor is.


class _Elsewhere:
    """The other living checkpoints, history first, newest first. Their indexes are read when they are needed."""

    def __init__(self, repository: Repository, but: CheckpointId, world: int, options: Options) -> None:
        self._repository = repository
        self._but = but
        self._world = world
        self._options = options
        self._commits: list[Commit] | None = None

    def _others(self) -> Iterator[Commit]:
        if self._commits is None:
            self._commits = []
            for checkpoint in _newest_first(Catalog(self._repository)):
                if checkpoint != self._but:
                    try:
                        commit = self._repository.commit(checkpoint)
                    except CheckpointError as error:
                        _raise_if_store_failed(error)
                        continue
                    if isinstance(commit, Commit):
                        self._commits.append(commit)
        return iter(self._commits)

    def _readers(self, commit: Commit, rank: int) -> Iterator[tuple[int, Reader]]:
        """The same rank's index; where the world was another, all ranks': a shard's place in the whole says which one it is."""
        for other in [rank] if commit.world == self._world else range(commit.world):
            try:
                yield other, open_vote(self._repository.store, commit.vote(other))
            except CheckpointError as error:
                _raise_if_store_failed(error)

    def expected(self, rank: int, why: tuple[str, ...]) -> list[LostTensor]:
        """What a rank without an index has most likely lost: what the newest other checkpoint of as many ranks has there."""
        for commit in self._others():
            if commit.world == self._world:
                for _, reader in self._readers(commit, rank):
                    return [
                        LostTensor(e.name, e.dtype, e.shape, why, assumed=True, place=e.place)
                        for e in reader.directory.tensors
                    ]
        return []

    def find(self, rank: int, lost: Sequence[LostTensor]) -> None:
        """Enter in each where it is."""
        missing = [tensor for tensor in lost if tensor.found_in is None]
        for commit in self._others() if missing else ():
            for other, reader in self._readers(commit, rank):
                self._find_in(reader, FoundIn(commit.checkpoint, other), missing)
                missing = [tensor for tensor in missing if tensor.found_in is None]
                if not missing:
                    return

    def _find_in(self, reader: Reader, where: FoundIn, missing: Sequence[LostTensor]) -> None:
        there = {entry.name: entry for entry in reader.directory.tensors}
        fits = []
        for tensor in missing:
            entry = there.get(tensor.name)
            if entry is not None:
                same = (entry.dtype, entry.shape, entry.place) == (tensor.dtype, tensor.shape, tensor.place)
                fits += [(tensor, entry)] if same else []
        needed = sorted({record for _, entry in fits for record, *_ in reader.pieces(entry.storage)})
        bad = verify(reader, needed, self._options.threads) if needed else {}
        for tensor, entry in fits:
            if not any(record in bad for record, *_ in reader.pieces(entry.storage)):
                tensor.found_in = where


def _raise_if_store_failed(error: CheckpointError) -> None:
    """A checkpoint that cannot be read is passed over; a store that does not answer is not the checkpoint's fault."""
    if isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError):
        raise error


def _newest_first(catalog: Catalog) -> list[CheckpointId]:
    """History, then everything else; where the history cannot be known, by epoch and step."""
    try:
        inside = list(catalog.history())
    except CorruptCheckpointError:
        inside = []
    return [*inside, *(c for c in reversed(catalog.listing.commits) if c not in set(inside))]


# The report.


def report_to_json(report: SalvageReport) -> dict[str, Any]:
    """The members of report.json and of `--json` (docs/cli.md), without `schema`."""
    return {
        "url": report.url,
        "epoch": report.checkpoint.epoch,
        "step": report.checkpoint.step,
        "try": report.attempt,
        "world": report.world,
        "commit": report.commit,
        "nothing_lost": report.nothing_lost,
        "ranks": [
            {
                "rank": rank.rank,
                "file": None if rank.file is None else Path(rank.file).name,
                "saved": rank.saved,
                "saved_bytes": rank.saved_bytes,
                "lost_whole": rank.lost_whole,
                "object_whole": rank.object_whole,
                "notes": rank.notes,
                "lost": [_lost_to_json(tensor) for tensor in rank.lost],
            }
            for rank in report.ranks
        ],
    }


def _lost_to_json(tensor: LostTensor) -> dict[str, Any]:
    found = tensor.found_in
    return {
        "name": to_json(tensor.name),
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "why": list(tensor.why),
        "assumed": tensor.assumed,
        "found_in": None
        if found is None
        else {"epoch": found.checkpoint.epoch, "step": found.checkpoint.step, "rank": found.rank},
    }


def _write_json(path: str, value: dict[str, Any]) -> None:
    with committing(AtomicFile(path)) as sink:
        text = json.dumps({"schema": "fastckpt.salvage/1", **value}, indent=1, ensure_ascii=True)
        sink.write(f"{text}\n".encode())


__all__ = [
    "FoundIn",
    "LostTensor",
    "SalvageReport",
    "SalvagedRank",
    "choose_try",
    "find_votes",
    "report_to_json",
    "salvage",
]
