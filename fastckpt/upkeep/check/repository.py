"""Everything that can be known about a repository: every record, every vote, every byte of every pack, and what does not belong.

    LIST ─→ records ─→ votes (indexes, lengths of packs) ─→ packs, each once: crc64nvme of the whole, every chunk decoded ─→ report

Changes nothing; repair.py does.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from fastckpt.errors import (
    CorruptCheckpointError,
    Damage,
    ObjectNotFoundError,
    RepositoryError,
    UnsupportedFormatError,
)
from fastckpt.format import keys, records
from fastckpt.format.digest import digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.format.repository_records import (
    Commit,
    Epoch,
    Parent,
    Pin,
    Tombstone,
    commit_bytes,
    parse_marker,
    parse_pin,
)
from fastckpt.format.vote import Vote, commit_of, part_ranges, save_info
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import MAX_RAW_BYTES, transform_name
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource
from fastckpt.repository.catalog import history, stand_in
from fastckpt.repository.commit import complete_set, open_vote, read_sealed, read_vote, read_vote_bytes
from fastckpt.repository.inventory import Inventory, inventory_of
from fastckpt.repository.repository import Repository
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.upkeep.check.held_pack import HeldPack

Progress = Callable[[int, int], None]

_LARGE_PACK_BYTES = 64 << 20  # twice what our writer makes; a larger one is kept in memory only if the budget has room


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    key: str
    damage: Damage
    """part: the kind of object (marker, epoch, commit, vote, pack, pin), or the part of a vote."""
    checkpoint: CheckpointId | None = None
    """The checkpoint that cannot be restored because of it; None: it harms none that was checked."""
    rank: int | None = None
    rank_lost: bool = False
    """All tensors of that rank are lost; their names are in the object that is."""

    def __str__(self) -> str:
        whole = (
            ""
            if not self.rank_lost
            else " (affects every rank)"
            if self.rank is None
            else f" (all of rank {self.rank})"
        )
        return f"{self.damage}{whole}"


@dataclass
class CheckpointState:
    """A checkpoint, and whether it can be restored."""

    checkpoint: CheckpointId
    state: str
    """"ok", "damaged", "unsupported" (a newer fastckpt may read it), "retired" (while it was checked) or "not checked"."""
    branch: str
    """"history", "abandoned", or "unknown" where a damaged epoch record hides it."""
    tensors_lost: tuple[str, ...] = ()
    ranks_lost: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnfinishedSave:
    """A save without a commit record."""

    save: SaveId
    state: str
    """"completable", "incomplete" (votes are missing), "damaged", or "superseded" (another try of the step was committed)."""
    why: str
    votes: int
    world: int | None
    packs: int
    n_bytes: int
    """Of its packs and votes."""


@dataclass
class RepositoryReport:
    """What was found. `ok`: everything is right and nothing was left out."""

    url: str
    quick: bool
    repository: str | None = None
    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """What this version cannot vouch for, in words."""
    notes: list[str] = field(default_factory=list)
    """What is no damage, but good to know."""
    checkpoints: list[CheckpointState] = field(default_factory=list)
    """Newest first."""
    unfinished: list[UnfinishedSave] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    history: tuple[CheckpointId, ...] = ()
    packs: int = 0
    """Packs that were read whole; `pack_bytes` and `chunks` are what was in them. 0 if `quick`."""
    pack_bytes: int = 0
    chunks: int = 0

    @property
    def ok(self) -> bool:
        return not self.findings and not self.not_checked


def check_repository(
    repository: Repository,
    progress: Progress = lambda done, total: None,
    *,
    steps: Collection[int] | None = None,
    quick: bool = False,
    options: Options | None = None,
) -> RepositoryReport:
    """Read and verify everything. Damage is reported, never raised; StoreError is raised, except for objects that are missing.

    progress: called on this thread with bytes of packs done and in all. steps: look into checkpoints of these steps only (records are read
    all the same). quick: packs by length only.
    Takes `options.threads` × (one pack + 8 MiB), one checkpoint's indexes, and some 100 bytes for each chunk of the repository.
    """
    return _Check(repository, progress, steps, quick, options or Options()).run()


class _Names(NamedTuple):
    """One LIST of everything, sorted by what it is."""

    sizes: dict[str, int]
    listing: Inventory
    votes: dict[SaveId, list[VoteName]]
    packs: dict[SaveId, list[str]]
    pins: dict[str, float]
    foreign: list[str]
    now_s: float


def classify(infos: Iterable[ObjectInfo]) -> _Names:
    """Keys by their form (docs/format.md, section 11). Pure."""
    sizes: dict[str, int] = {}
    epochs: list[int] = []
    commits: dict[CheckpointId, float] = {}
    votes: dict[SaveId, list[VoteName]] = defaultdict(list)
    packs: dict[SaveId, list[str]] = defaultdict(list)
    pins: dict[str, float] = {}
    foreign: list[str] = []
    now_s = 0.0
    infos = list(infos)
    for info in infos:
        key = info.key
        sizes[key] = info.n_bytes
        now_s = max(now_s, info.modified_s)
        if (epoch := keys.parse_epoch(key)) is not None:
            epochs.append(epoch)
        elif (checkpoint := keys.parse_commit(key)) is not None:
            commits[checkpoint] = info.modified_s
        elif (vote := keys.parse_vote(key)) is not None:
            votes[vote.save].append(vote)
        elif (save := keys.parse_pack(key)) is not None:
            packs[save].append(key)
        elif keys.parse_pin(key) is not None:
            pins[key] = info.modified_s
        elif key not in (keys.MARKER, keys.README):
            foreign.append(key)
    listing = inventory_of(infos)
    return _Names(sizes, listing, dict(votes), dict(packs), pins, foreign, now_s)


class _PackUse(NamedTuple):
    """A pack as one rank's file table has it, and its chunks there."""

    rank: int
    reader: Reader
    entry: FileEntry
    numbers: list[int]


class _PackResult(NamedTuple):
    """What reading a pack found."""

    n_read: int
    crc: int | None
    """Of the whole; None: it was not read as a whole."""
    too_large: bool
    good: list[bytes]
    bad: list[tuple[bytes, int, Reader, int, Damage]]
    """(identity, rank, reader, chunk, damage)."""


class _Check:
    """One run of check_repository: state that its stages share."""

    def __init__(
        self, repository: Repository, progress: Progress, steps: Collection[int] | None, quick: bool, options: Options
    ) -> None:
        self._repository = repository
        self._store: Store = repository.store
        self._progress = progress
        self._steps = steps
        self._quick = quick
        self._options = options
        self._report = RepositoryReport(repository.url, quick)
        self._epochs: dict[int, Epoch] = {}
        self._commits: dict[CheckpointId, Commit] = {}
        self._tombstones: dict[CheckpointId, Tombstone] = {}
        self._unreadable: set[CheckpointId] = set()
        self._unsupported: set[CheckpointId] = set()
        self._referenced: set[str] = set()
        # Verdicts, so that what checkpoints share is read once: packs by key → crc; chunks by an identity of 16 bytes.
        self._pack_crcs: dict[str, int | None] = {}
        self._good: set[bytes] = set()
        self._bad: dict[bytes, Damage] = {}
        self._done_bytes = self._total_bytes = 0
        self._held = HeldPack(self._store)

    def run(self) -> RepositoryReport:
        # One LIST in the order of keys: commits before data before votes. A commit that it shows has its packs in it too.
        self._names = classify(self._store.list(""))
        self._check_marker()
        self._check_epochs()
        self._check_commits()
        self._check_parents()
        self._check_pins()
        inside = self._history()
        chosen = [c for c in self._commits.values() if self._steps is None or c.save.step in self._steps]
        # Oldest first: the save that wrote a pack uses all of it, so what later ones share is already known.
        needed: dict[str, int] = {}
        for commit in chosen:
            needed.update(self._check_votes(commit))
        if not self._quick:
            self._total_bytes = sum(needed.values())
            pool = WorkerPool(self._options.threads, "fastckpt-check")
            try:
                for commit in chosen:
                    self._check_packs(commit, pool)
            finally:
                pool.close()
            self._progress(self._total_bytes, self._total_bytes)
        self._check_unfinished()
        self._note_leftovers()
        self._finish(inside, {commit.checkpoint for commit in chosen})
        return self._report

    # Records.

    def _add(self, key: str, damage: Iterable[Damage], checkpoint: CheckpointId | None = None, **more: Any) -> None:
        self._report.findings += [Finding(key, item, checkpoint, **more) for item in damage]

    def _read(self, key: str, read: Callable[[], Any], checkpoint: CheckpointId | None = None, **more: Any) -> Any:
        """What `read` returns, or None and a finding."""
        try:
            return read()
        except ObjectNotFoundError:
            self._add(key, [Damage(key.partition("/")[0], "as a whole", "an object", "none")], checkpoint, **more)
        except CorruptCheckpointError as error:
            self._add(key, error.damage, checkpoint, **more)
        except UnsupportedFormatError as error:
            self._report.not_checked.append(str(error))
            if checkpoint is not None:
                self._unsupported.add(checkpoint)
        return None

    def _check_marker(self) -> None:
        where = f"{self._store.url}/{keys.MARKER}"
        marker = self._read(keys.MARKER, lambda: parse_marker(read_sealed(self._store, keys.MARKER), where))
        if marker is not None:
            self._report.repository = marker.repository
        if keys.README not in self._names.sizes:
            self._report.notes.append(f"{keys.README} is missing: it tells people what must not be deleted here")

    def _check_epochs(self) -> None:
        listing = self._names.listing
        for number in listing.epochs:
            epoch = self._read(keys.epoch_key(number), functools.partial(self._repository.epoch, number))
            if epoch is not None:
                self._epochs[number] = epoch
        highest = max((*listing.epochs, *(c.epoch for c in listing.commits)), default=0)
        claimed = {c.epoch for c in listing.commits} | set(range(1, max(listing.epochs, default=0)))
        for number in sorted(claimed - set(listing.epochs)):
            if number <= highest:
                damage = Damage("epochs", "as a whole", "a record: epochs are claimed without gaps", "no such object")
                self._add(keys.epoch_key(number), [damage])

    def _check_commits(self) -> None:
        for checkpoint in self._names.listing.commits:
            key = keys.commit_key(checkpoint)
            try:
                found = self._read(key, functools.partial(self._get, checkpoint), checkpoint, rank_lost=True)
            except _Gone:
                continue
            if isinstance(found, Commit):
                self._commits[checkpoint] = found
            elif isinstance(found, Tombstone):
                self._tombstones[checkpoint] = found
            else:
                self._unreadable.add(checkpoint)

    def _get(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        try:
            return self._repository.commit(checkpoint)
        except ObjectNotFoundError:  # a tombstone that went since the LIST
            raise _Gone from None

    def _check_parents(self) -> None:
        parents: list[tuple[str, Parent | None]] = [(keys.epoch_key(n), e.parent) for n, e in self._epochs.items()]
        parents += [(keys.commit_key(c), commit.parent) for c, commit in self._commits.items()]
        for key, parent in parents:
            there = None if parent is None else self._commits.get(parent.checkpoint)
            if parent is not None and there is not None and there.digest != parent.digest:
                damage = Damage("parent", str(parent.checkpoint), parent.digest, f"{there.digest}: another record")
                self._add(key, [damage])

    def _check_pins(self) -> None:
        for key, modified_s in self._names.pins.items():
            try:
                pin = parse_pin(read_sealed(self._store, key), f"{self._store.url}/{key}")
            except ObjectNotFoundError:
                continue
            except CorruptCheckpointError as error:
                self._add(key, error.damage)
                continue
            except UnsupportedFormatError as error:
                self._report.not_checked.append(str(error))
                continue
            self._report.pins.append(pin)
            if self._names.now_s - modified_s > pin.expires_s:
                self._report.notes.append(f"{key} has expired: the next pass of retention, or prune, removes it")
            elif pin.checkpoint not in self._commits and pin.checkpoint not in self._unreadable:
                self._report.notes.append(f"{key} pins checkpoint {pin.checkpoint}, which is not there")

    def _history(self) -> list[CheckpointId] | None:
        """None: epoch records that it goes through are damaged."""
        listing = self._names.listing

        def epoch_of(number: int) -> Epoch | None:
            if number in listing.epochs and number not in self._epochs:
                raise _Gone
            if number in self._epochs:
                return self._epochs[number]
            return stand_in(number, [c for checkpoint, c in self._commits.items() if checkpoint.epoch == number])

        newest = max((*listing.epochs, *(c.epoch for c in listing.commits)), default=0)
        try:
            found = list(history(newest, epoch_of, [*self._commits, *self._unreadable]))
        except _Gone:
            return None
        self._report.history = tuple(found)
        return found

    # Votes.

    def _open(self, commit: Commit, rank: int) -> Reader:
        """A vote whose packs are read from this thread's memory where they are held there."""
        name = commit.vote(rank)
        source = BytesSource(read_vote_bytes(self._store, name), f"{self._store.url}/{keys.vote_key(name)}")
        return Reader.open_vote(source, self._held.source)

    def _check_votes(self, commit: Commit) -> dict[str, int]:
        """All votes of a checkpoint and the lengths of their packs. Returns the packs that are to be read, and their lengths."""
        checkpoint = commit.checkpoint
        sizes = self._names.sizes
        needed: dict[str, int] = {}
        votes = []
        for rank in range(commit.world):
            name = commit.vote(rank)
            key = keys.vote_key(name)
            read = functools.partial(open_vote, self._store, name)
            reader = self._read(key, read, checkpoint, rank=rank, rank_lost=True)
            if reader is None:
                continue
            info = self._read(key, functools.partial(save_info, reader.directory, name, key), checkpoint, rank=rank)
            if info is not None:
                votes.append(Vote(name, info, reader.directory, part_ranges(reader.footer), reader.files))
            for number, file in enumerate(reader.files, 1):
                self._referenced.add(file.key)
                found = sizes.get(file.key)
                if found is not None:
                    needed[file.key] = found
                if found != file.n_bytes:
                    what = "no such object" if found is None else f"{found} bytes"
                    # What is lost of a pack that is there is found out chunk by chunk.
                    lost = reader.tensors_of_file(number) if found is None or self._quick else ()
                    damage = Damage("pack", "length", f"{file.n_bytes} bytes", what, lost)
                    self._add(file.key, [damage], checkpoint, rank=rank)
            unread = records.unsupported(reader.records)
            if unread:
                self._unsupported.add(checkpoint)
                used = ", ".join(sorted({transform_name(int(reader.records["transform"][n])) for n in unread}))
                words = f"{key}: {len(unread)} chunks use transforms of a newer fastckpt ({used})"
                self._report.not_checked.append(words)
        if len(votes) == commit.world:
            self._compare(commit, votes)
        return needed

    def _compare(self, commit: Commit, votes: Sequence[Any]) -> None:
        """The record follows from the votes alone; whoever wrote another one has changed it."""
        key = keys.commit_key(commit.checkpoint)
        expected = self._read(key, lambda: commit_of(votes, key), commit.checkpoint)
        if expected is not None and commit_bytes(replace(expected, digest="")) != commit_bytes(
            replace(commit, digest="")
        ):
            differ = [
                name for name in vars(commit) if name != "digest" and _differ(vars(commit)[name], vars(expected)[name])
            ]
            damage = Damage("commit", ", ".join(differ) or "as a whole", "what the votes say", "something else")
            self._add(key, [damage])

    # Packs.

    def _check_packs(self, commit: Commit, pool: WorkerPool) -> None:
        uses: dict[str, list[_PackUse]] = defaultdict(list)
        for rank in range(commit.world):
            try:
                reader = self._open(commit, rank)
            except (CorruptCheckpointError, UnsupportedFormatError, ObjectNotFoundError):
                continue  # _check_votes has listed it
            unread = set(records.unsupported(reader.records))
            by_file: dict[int, list[int]] = defaultdict(list)
            for number, file in enumerate(reader.records["file"].tolist()):
                if number not in unread:
                    by_file[file].append(number)
            for file, numbers in by_file.items():
                entry = reader.files[file - 1] if file else FileEntry("", 0, 0)
                uses[entry.key].append(_PackUse(rank, reader, entry, numbers))
        pending = []
        for key, used in uses.items():
            if key and key not in self._names.sizes:
                continue  # missing: listed with all that it takes along
            # What an earlier checkpoint has shown is not read again, but what it has shown to be bad is listed again: for this one.
            known = [[self._known(use, number) for number in use.numbers] for use in used]
            self._repeat(commit, used, known)
            if key not in self._pack_crcs or any(None in one for one in known):
                todo = [
                    use._replace(numbers=[n for n, verdict in zip(use.numbers, one, strict=True) if verdict is None])
                    for use, one in zip(used, known, strict=True)
                ]
                pending.append((key, used, pool.submit(functools.partial(self._read_pack, key, todo))))
            else:
                self._compare_crcs(commit, used, key, self._pack_crcs[key], set())
        for key, used, future in pending:
            self._enter(commit, key, used, future.result())

    def _known(self, use: _PackUse, number: int) -> bool | None:
        identity = _identity(use.entry.key, use.reader.records[number])
        return True if identity in self._good else False if identity in self._bad else None

    def _repeat(self, commit: Commit, used: Sequence[_PackUse], known: Sequence[Sequence[bool | None]]) -> None:
        for use, verdicts in zip(used, known, strict=True):
            for number, verdict in zip(use.numbers, verdicts, strict=True):
                if verdict is False:
                    first = self._bad[_identity(use.entry.key, use.reader.records[number])]
                    again = replace(first, tensors=use.reader.tensors_of(number))
                    self._add(use.entry.key, [again], commit.checkpoint, rank=use.rank)

    def _read_pack(self, key: str, uses: Sequence[_PackUse]) -> _PackResult:
        """On a worker: read a pack whole, then its chunks out of memory. Key "": chunks that store nothing."""
        n_bytes = self._names.sizes[key] if key else 0
        room = max(_LARGE_PACK_BYTES, self._options.host_budget_bytes // (2 * self._options.threads))
        too_large = n_bytes > room
        crc = None
        if key and not too_large:
            crc = self._held.hold(key, n_bytes)
        good, bad = [], []
        out = np.empty(MAX_RAW_BYTES, np.uint8)
        try:
            for use in uses:
                for number in use.numbers:
                    identity = _identity(key, use.reader.records[number])
                    damage = use.reader.read_chunk(number, out[: int(use.reader.records["raw_bytes"][number])])
                    if damage is None:
                        good.append(identity)
                    else:
                        bad.append((identity, use.rank, use.reader, number, damage))
        finally:
            self._held.release()
        return _PackResult(n_bytes, crc, too_large, good, bad)

    def _enter(self, commit: Commit, key: str, used: Sequence[_PackUse], result: _PackResult) -> None:
        report = self._report
        where = key or None
        self._good.update(result.good)
        for identity, rank, reader, number, damage in result.bad:
            self._bad[identity] = damage
            owner = where or keys.vote_key(commit.vote(rank))
            self._add(owner, [replace(damage, tensors=reader.tensors_of(number))], commit.checkpoint, rank=rank)
        report.chunks += len(result.good) + len(result.bad)
        if key and key not in self._pack_crcs:
            self._pack_crcs[key] = result.crc
            report.packs += 1
            report.pack_bytes += result.n_read
            self._done_bytes += result.n_read
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
            if result.too_large:
                words = f"{key}: {result.n_read} bytes do not fit the memory of a check; its chunks were read, its crc64nvme was not"
                report.not_checked.append(words)
        if key:
            self._compare_crcs(commit, used, key, self._pack_crcs[key], {rank for _, rank, *_ in result.bad})

    def _compare_crcs(
        self, commit: Commit, used: Sequence[_PackUse], key: str, crc: int | None, bad_ranks: Collection[int]
    ) -> None:
        """The pack's checksum as a whole. Where no chunk is hurt, the damage lies in bytes that this checkpoint does not use."""
        for use in used:
            if crc is not None and crc != use.entry.crc64nvme and self._names.sizes[key] == use.entry.n_bytes:
                hurt = use.rank in bad_ranks or any(self._known(use, number) is False for number in use.numbers)
                found = f"{crc:016x}" + ("" if hurt else ", in bytes that no tensor of this checkpoint needs")
                damage = Damage("pack", "crc64nvme of the whole", f"{use.entry.crc64nvme:016x}", found)
                self._add(key, [damage], commit.checkpoint if hurt else None, rank=use.rank)

    # What is no checkpoint.

    def _check_unfinished(self) -> None:
        names = self._names
        taken = self._commits.keys() | self._tombstones.keys() | self._unreadable
        waiting_bytes = 0
        for save in sorted({*names.votes, *names.packs}):
            votes, packs = names.votes.get(save, []), names.packs.get(save, [])
            commit = self._commits.get(save.checkpoint)
            if commit is not None and commit.save == save:
                continue
            if save.checkpoint not in taken:
                try:
                    if self._repository.commit(save.checkpoint):
                        continue  # committed since the LIST
                except ObjectNotFoundError:
                    pass
                except (CorruptCheckpointError, UnsupportedFormatError):
                    continue
                state, why = self._completable(save, votes)
            elif commit is None and save.checkpoint in self._unreadable:
                continue  # the votes of a damaged record: `salvage` reads them
            elif commit is not None:
                packs = [key for key in packs if key not in self._referenced]
                state, why = "superseded", f"try {commit.save.attempt} of this step was committed"
            else:  # retired: the next passes of retention delete these
                own = [key for key in packs if key not in self._referenced]
                waiting_bytes += sum(names.sizes[key] for key in (*own, *map(keys.vote_key, votes)))
                continue
            if not votes and not packs:
                continue
            n_bytes = sum(names.sizes[key] for key in (*packs, *map(keys.vote_key, votes)))
            world = votes[0].world if votes else None
            self._report.unfinished.append(UnfinishedSave(save, state, why, len(votes), world, len(packs), n_bytes))

        if self._tombstones:
            words = "deleted by the job's retention once their grace is over, or by `fastckpt prune`"
            n_retired = len(self._tombstones)
            self._report.notes.append(
                f"{n_retired} steps are retired; what is left of them ({waiting_bytes} bytes) is {words}"
            )

    def _completable(self, save: SaveId, votes: Sequence[VoteName]) -> tuple[str, str]:
        try:
            names = complete_set(votes, str(save))
        except RepositoryError as error:
            return "damaged", str(error)
        if names is None:
            there = sorted(vote.rank for vote in votes)
            of = votes[0].world if votes else "an unknown number of"
            return (
                "incomplete",
                f"votes of {len(there)} of {of} ranks: under way, or its job died and nothing can complete it",
            )
        for name in names:
            try:
                vote = read_vote(self._store, name)
            except (CorruptCheckpointError, UnsupportedFormatError, ObjectNotFoundError) as error:
                return "damaged", str(error)
            for file in vote.files:
                found = self._names.sizes.get(file.key)
                if found != file.n_bytes:
                    return "damaged", f"{file.key}: expected {file.n_bytes} bytes, found {found or 'no such object'}"
                self._referenced.add(file.key)
        return "completable", "the votes of all ranks are there"

    def _note_leftovers(self) -> None:
        notes, sizes = self._report.notes, self._names.sizes
        for key in self._names.foreign:
            words = (
                "left by a probe of the store" if key.startswith("probe/") else "not ours: never read, never deleted"
            )
            notes.append(f"{key} ({sizes[key]} bytes) is {words}")
        if self._steps is None and not self._report.findings:
            for commit in self._commits.values():
                own = [key for key in self._names.packs.get(commit.save, []) if key not in self._referenced]
                if own:
                    n_bytes = sum(sizes[key] for key in own)
                    notes.append(f"data/{commit.save}/: {len(own)} packs ({n_bytes} bytes) are named by no checkpoint")

    def _finish(self, inside: list[CheckpointId] | None, chosen: Collection[CheckpointId]) -> None:
        report = self._report
        hurt: dict[CheckpointId, list[Finding]] = defaultdict(list)
        for finding in report.findings:
            if finding.checkpoint is not None:
                hurt[finding.checkpoint].append(finding)
        retired = {checkpoint for checkpoint in hurt if self._retired_since(checkpoint)}
        report.findings = [f for f in report.findings if f.checkpoint not in retired]
        for checkpoint in sorted([*self._commits, *self._unreadable], reverse=True):
            found = hurt.get(checkpoint, [])
            if checkpoint in retired:
                state, found = "retired", []
            elif found:
                state = "damaged"
            elif checkpoint in self._unsupported:
                state = "unsupported"
            else:
                state = "ok" if checkpoint in chosen else "not checked"
            branch = "unknown" if inside is None else "history" if checkpoint in inside else "abandoned"
            tensors = tuple(dict.fromkeys(name for f in found for name in f.damage.tensors))
            ranks = tuple(sorted({f.rank for f in found if f.rank_lost and f.rank is not None}))
            report.checkpoints.append(CheckpointState(checkpoint, state, branch, tensors, ranks))

    def _retired_since(self, checkpoint: CheckpointId) -> bool:
        """A running job's retention may take a checkpoint from under a check: that is no damage."""
        try:
            return isinstance(self._repository.commit(checkpoint), Tombstone)
        except ObjectNotFoundError:
            return True
        except (CorruptCheckpointError, UnsupportedFormatError):
            return False


class _Gone(Exception):
    """Not there any more, or not readable; only inside of this module."""


def _identity(key: str, record: Any) -> bytes:
    """Of a chunk in a pack: key, place and everything that it is checked against."""
    bare = record.copy()
    bare["file"] = 0
    return digest(key.encode() + bare.tobytes())


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() != b.keys() or any(_differ(a[key], b[key]) for key in a)
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return bool(a != b) and not both_nan


__all__ = [
    "CheckpointState",
    "Finding",
    "RepositoryReport",
    "UnfinishedSave",
    "check_repository",
    "classify",
]
