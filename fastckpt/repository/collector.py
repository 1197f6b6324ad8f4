"""Carries out retention: reads what lies in the repository, then retires and deletes what a plan says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from fastckpt import events
from fastckpt.errors import (
    CheckpointError,
    MissingObjectError,
    ObjectChangedError,
    StoreUnavailableError,
    UnreadableError,
    UnsupportedVerbError,
)
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.pack_ranges import PackRanges, ranges_of
from fastckpt.format.repository_records import Commit, Tombstone, tombstone_bytes, utc_now
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import create, read_for_replacing
from fastckpt.repository.file_tables import packs_of
from fastckpt.repository.inventory import Inventory, take_inventory
from fastckpt.repository.known_records import KnownRecords
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import (
    UNFINISHED,
    Candidate,
    Pins,
    RepositoryView,
    RetentionPlan,
    TombstoneSeen,
)
from fastckpt.repository.vote_set import vote_set_of
from fastckpt.store.base import Store
from fastckpt.store.wrap import T, Wrapper

_SKIPPED_PASSES = 16  # for an object under a legal hold that is a sixteenth of a request in each pass
_BATCH = 100  # deletions between two checks for a newer epoch: some seconds


class PassInterrupted(Exception):
    """A pass ended before its next request, at its caller's wish. Its work so far is kept, and the next pass continues from there."""


class _Gate(Wrapper):
    """Asks before every request whether the pass may continue."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.interrupted: Callable[[], bool] = lambda: False

    def _call(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        if self.interrupted():
            raise PassInterrupted
        return operation()


class Collector:
    """Retention of one repository. One thread at a time. Remembers contents of records and indexes, never names."""

    def __init__(self, repository: Repository) -> None:
        self._store = _Gate(repository.store)
        self._repository = KnownRecords(self._store)
        self._needed_by: dict[tuple[CheckpointId, str], frozenset[str]] = {}
        self._living: set[CheckpointId] = set()
        """Checkpoints that the previous pass saw, or that were committed since, and that were not retired here."""
        self._bare: dict[CheckpointId, tuple[float, float | None]] = {}
        """Tombstones without votes and packs. For each: `now_s` of the first pass that saw it so, and of the first later pass for which the
        store's clock had advanced. The second time is certainly after the deletion of the last object.
        """
        self._passes = 0
        self._refused: dict[str, int] = {}
        """Keys that could not be deleted or overwritten → the pass in which they are tried again, which costs a request each."""

    def interrupt_when(self, interrupted: Callable[[], bool]) -> None:
        """From now on a pass ends with PassInterrupted before the first request at which `interrupted()` is true."""
        self._store.interrupted = interrupted

    def know(self, commit: Commit, packs: Collection[str]) -> None:
        """Tell the collector the packs of a commit, so that it need not read the index. Any thread."""
        self._needed_by[commit.checkpoint, commit.digest] = frozenset(packs)

    def look(self) -> RepositoryView:
        """Read everything that a plan needs: five LISTs, and the records and file tables not seen before. StoreError, PassInterrupted."""
        # List data before commits: if a save commits in between, both its packs and its commit are missing here, or both are seen; never
        # packs without their commit.
        data = take_inventory(self._store, keys.DATA, keys.VOTES)
        catalog = Catalog(self._repository)
        listing = catalog.listing
        found = self._repository.read_all(listing)
        commits = found.commits
        now_s = max(data.newest_s, *listing.commit_times_s.values(), 0.0)
        pins = self._pins(now_s)
        there = {save.checkpoint for save in (*data.votes, *data.packs)}
        missing = self._missing(listing, commits, there)
        self._forget(commits, {*listing.infos, *pins.expired, *data.infos})
        times_s = listing.commit_times_s
        bare_since_s = self._bare_since_s(found.tombstones.keys() - there, now_s)
        return RepositoryView(
            newest_epoch=listing.newest_epoch,
            history=[]
            if missing
            else [Candidate(c, commits[c].metrics, times_s[c]) for c in catalog.history() if c in commits],
            living=commits,
            tombstones={
                c: _seen(tombstone, times_s[c], bare_since_s.get(c)) for c, tombstone in found.tombstones.items()
            },
            commit_times_s=times_s,
            unreadable={*found.failed, *found.missing},
            votes={save: [keys.vote_key(name) for name in names] for save, names in data.votes.items()},
            vote_sets={save: vote_set_of(names).state for save, names in data.votes.items()},
            packs=data.packs,
            needed=None if found.failed or found.missing else self._all_needed(commits.values()),
            pins=pins,
            now_s=now_s,
            sizes={key: data.infos[key].n_bytes for packs in data.packs.values() for key in packs},
            missing=missing,
        )

    def _missing(
        self, listing: Inventory, commits: Mapping[CheckpointId, Commit], there: Collection[CheckpointId]
    ) -> list[str]:
        """Keys of records that must exist and do not."""
        epochs = {c.epoch for c in commits} - set(listing.epochs)
        gone = {c for c in self._living - set(listing.commits) if c in there}
        self._living = gone | commits.keys()
        return [*map(keys.epoch_key, sorted(epochs)), *map(keys.commit_key, sorted(gone))]

    def _forget(self, commits: Mapping[CheckpointId, Commit], listed: set[str]) -> None:
        """Forget records that no longer exist; otherwise memory would grow with the age of the run."""
        living = {(c, commit.digest) for c, commit in commits.items()}
        self._needed_by = {key: packs for key, packs in self._needed_by.copy().items() if key in living}
        self._refused = {key: at for key, at in self._refused.items() if key in listed}

    def _bare_since_s(self, bare: Collection[CheckpointId], now_s: float) -> dict[CheckpointId, float]:
        before, self._bare = self._bare, {}
        for checkpoint in bare:
            first_s, since_s = before.get(checkpoint, (now_s, None))
            self._bare[checkpoint] = first_s, now_s if since_s is None and now_s > first_s else since_s
        return {checkpoint: since_s for checkpoint, (_, since_s) in self._bare.items() if since_s is not None}

    def _all_needed(self, commits: Iterable[Commit]) -> set[str] | None:
        """Packs that checkpoints name. None if that cannot be read for one of them."""
        needed: set[str] = set()
        for commit in commits:
            key = commit.checkpoint, commit.digest
            if key not in self._needed_by:
                try:
                    self._needed_by[key] = packs_of(self._store, commit)
                except UnreadableError:
                    return None
            needed |= self._needed_by[key]
        return needed

    def _pins(self, now_s: float) -> Pins:
        pinned, expired, unknown = set(), [], False
        for name, info in self._repository.pins().items():
            try:
                pin = self._repository.pin(name)
            except MissingObjectError:
                continue
            except UnreadableError:
                unknown = True
                continue
            if now_s - info.modified_s > pin.expires_s:
                expired.append(info.key)
            else:
                pinned.add(pin.checkpoint)
        return Pins(pinned, expired, unknown)

    def run(
        self,
        todo: RetentionPlan,
        as_epoch: int | None,
        in_flight: Callable[[], Collection[SaveId]] = tuple,
    ) -> list[CheckpointError]:
        """Carry out a plan. as_epoch: the caller's epoch; nothing is done unless it is the newest. None: a person says that the run is
        stopped. in_flight: gives the caller's saves under way; asked again before anything is deleted.

        Returns an error for each object that could not be deleted or overwritten; the next passes skip it. May be stopped anywhere and
        started again. StoreError, PassInterrupted.
        """
        refused: list[CheckpointError] = []
        self._passes += 1
        if not todo.retire or not self._may_go_on(as_epoch):
            blocked = {checkpoint for checkpoint, _ in todo.retire}
        else:
            flying = {save.checkpoint for save in in_flight()}
            blocked = {c for c, why in todo.retire if c in flying or not self._bury(c, why, refused)}
        for batch in _batches([key for key in todo.delete if not self._skips(key)]):
            if not self._may_go_on(as_epoch):
                break
            flying_saves = set(in_flight())
            for key in batch:
                vote = keys.parse_vote(key)
                save = vote.save if vote is not None else keys.parse_pack(key)
                if save is not None and (save in flying_saves or (vote is not None and save.checkpoint in blocked)):
                    continue
                if keys.parse_commit(key) in self._held():
                    continue
                self._try(key, refused, lambda key=key: self._store.delete(key))  # type: ignore[misc]
        stored, base, grace = todo.held
        events.emit(
            events.RetentionEnded(target=self._store.url, stored_bytes=stored, base_bytes=base, grace_bytes=grace)
        )
        return refused

    def _held(self) -> set[CheckpointId | None]:
        """Checkpoints whose votes or packs cannot be deleted. Their tombstones stay; otherwise they would count as unfinished saves
        again.
        """
        saves = (keys.parse_pack(key) or getattr(keys.parse_vote(key), "save", None) for key in self._refused)
        return {save.checkpoint for save in saves if save is not None}

    def _may_go_on(self, as_epoch: int | None) -> bool:
        return as_epoch is None or self._repository.newest_epoch() == as_epoch

    def _try(self, key: str, refused: list[CheckpointError], act: Callable[[], object]) -> bool:
        """Run a deletion or overwrite. False if it was refused. One object that cannot be deleted, or one record that cannot be read, does
        not stop the others.
        """
        try:
            act()
        except StoreUnavailableError:  # the store failed, not the object
            raise
        except CheckpointError as error:
            self._refused[key] = self._passes + _SKIPPED_PASSES
            refused.append(error)
            return False
        self._refused.pop(key, None)
        return True

    def _skips(self, key: str) -> bool:
        return self._refused.get(key, 0) > self._passes

    def _bury(self, checkpoint: CheckpointId, why: str, refused: list[CheckpointError]) -> bool:
        key, stands = keys.commit_key(checkpoint), False

        def act() -> None:
            nonlocal stands
            stands = self._put_tombstone(checkpoint, key, why)

        return not self._skips(key) and self._try(key, refused, act) and stands

    def _put_tombstone(self, checkpoint: CheckpointId, key: str, why: str) -> bool:
        """Put a tombstone. False if an unfinished save turned out to be committed: then the save stays."""
        found, version = read_for_replacing(self._store, checkpoint)  # the record as it is now
        if isinstance(found, Tombstone):
            return True
        if (found is None) != (why == UNFINISHED):  # the state has changed since the plan was made
            return False
        of = None if found is None else found.digest
        named = None if not isinstance(found, Commit) else self._named(found)
        data = tombstone_bytes(Tombstone(checkpoint, of, why, utc_now(), named))
        if found is None:
            if create(self._store, key, data) != data:
                return False
        elif not self._replace(key, data, version):
            return False
        self._living.discard(checkpoint)
        events.emit(events.Retired(target=self._store.url, epoch=checkpoint.epoch, step=checkpoint.step, why=why))
        return True

    def _named(self, commit: Commit) -> PackRanges | None:
        """Packs of other saves that a checkpoint names, for its tombstone; None if that cannot be read."""
        needed = self._all_needed([commit])
        return None if needed is None else ranges_of(key for key in needed if keys.parse_pack(key) != commit.save)

    def _replace(self, key: str, data: bytes, version: str | None) -> bool:
        """Replace a record. False if somebody has changed it since it was read: the next pass looks at it again.

        A bucket's policy may allow a replacement only with the condition that the record is still the one that was read. A store that
        cannot check that gets a plain overwrite.
        """
        if version is not None:
            try:
                self._store.replace_if_match(key, data, version)
                return True
            except ObjectChangedError:
                return False
            except UnsupportedVerbError:
                pass
        self._store.put(key, data)
        return True


def _seen(tombstone: Tombstone, written_s: float, bare_since_s: float | None) -> TombstoneSeen:
    replaced = tombstone.of is not None
    return TombstoneSeen(written_s, replaced, bare_since_s, tombstone.named if replaced else {})


def _batches(all_keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (all_keys[at : at + _BATCH] for at in range(0, len(all_keys), _BATCH))
