"""Which checkpoints stay, and how the others go: commit → tombstone → votes → packs (docs/guarantees.md, section 3).

`retire` and `plan` are pure: what is decided can be shown before it is done. `Collector` reads and deletes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastckpt import events
from fastckpt.errors import CheckpointError, ObjectNotFoundError, StoreError, StoreUnavailableError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.format.repository_records import Commit, Tombstone, tombstone_bytes, utc_now
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import create, open_vote
from fastckpt.repository.known_records import KnownRecords
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.wrap import T, Wrapper

GRACE_S = 7200.0  # longer than any save and any request that is still on its way (assumption A1)
UNFINISHED = "unfinished save"
_BATCH = 100  # deletions between two looks for a newer epoch: some seconds


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of the history stay. One that any of the rules wants is kept; `Keep(last=1)` is the least there is.

    last: the newest ones. every: those whose step is a multiple of it. best: those with the best value of a metric, `best_count` of them,
    smallest first unless mode is "max"; checkpoints without the metric, or with NaN, are never best. While no checkpoint has a value
    of it (a mistyped name, or none was measured yet) nothing is known of what is best: all stay, with a warning.
    """

    last: int = 3
    every: int | None = None
    best: str | None = None
    mode: str = "min"
    best_count: int = 1

    def __post_init__(self) -> None:
        problems = []
        if type(self.last) is not int or self.last < 1:
            problems.append(f"last is {self.last!r}: at least the newest checkpoint must stay")
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            problems.append(f"every is {self.every!r}: expected a number of steps ≥ 1 or None")
        if self.best is not None and (type(self.best) is not str or not self.best.strip()):
            problems.append(f"best is {self.best!r}: expected the name of a metric (a string) or None")
        if self.mode not in ("min", "max"):
            problems.append(f'mode is {self.mode!r}: expected "min" or "max"')
        if type(self.best_count) is not int or self.best_count < 1:
            problems.append(f"best_count is {self.best_count!r}: expected a number ≥ 1")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Candidate:
    """A living checkpoint of the history, for `retire`."""

    checkpoint: CheckpointId
    metrics: Mapping[str, float]


def retire(history: Sequence[Candidate], keep: Keep) -> list[CheckpointId]:
    """Those that no rule wants. history: newest first, as a restore would take them. Never the newest.

    None while the best is asked for and nothing tells which it is (see `nothing_measured`): one of them would be the best one.
    """
    if nothing_measured(history, keep):
        return []
    wanted = {candidate.checkpoint for candidate in history[: keep.last]}
    if keep.every is not None:
        wanted |= {c.checkpoint for c in history if c.checkpoint.step % keep.every == 0}
    if keep.best is not None:
        sign = 1.0 if keep.mode == "min" else -1.0
        measured = [
            (sign * c.metrics[keep.best], -i, c.checkpoint) for i, c in enumerate(history) if keep.best in c.metrics
        ]
        ranked = sorted(entry for entry in measured if not math.isnan(entry[0]))
        wanted |= {checkpoint for *_, checkpoint in ranked[: keep.best_count]}
    return [c.checkpoint for c in history if c.checkpoint not in wanted]


def nothing_measured(history: Sequence[Candidate], keep: Keep) -> bool:
    """Whether the best by a metric is to stay of which no checkpoint has a value."""
    return keep.best is not None and all(math.isnan(c.metrics.get(keep.best, math.nan)) for c in history)


def _without_measure(history: Sequence[Candidate], keep: Keep) -> str | None:
    """What to say where `nothing_measured` keeps checkpoints that the other rules would not."""
    if not history or not nothing_measured(history, keep) or not retire(history, replace(keep, best=None)):
        return None
    assert keep.best is not None
    known = sorted({name for candidate in history for name in candidate.metrics})
    if keep.best in known:
        return f"the metric {keep.best!r} is NaN in every checkpoint, so nothing is known of the best one: all stay"
    close = difflib.get_close_matches(keep.best, known, 1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"no checkpoint has the metric {keep.best!r} (there are: {', '.join(map(repr, known)) or 'none'}), so nothing is known of the "
        f"best one: all stay.{meant} Pass metrics={{{keep.best!r}: …}} to step or save_now, or give another name to Keep(best=…)"
    )


@dataclass(frozen=True)
class View:
    """What lies in a repository, as one pass of the collector sees it. Times by the store's clock."""

    newest_epoch: int
    history: Sequence[Candidate]
    living: Mapping[CheckpointId, Commit]
    tombstones: Mapping[CheckpointId, float]
    """When each was written."""
    commit_times_s: Mapping[CheckpointId, float]
    unreadable: Collection[CheckpointId]
    votes: Mapping[SaveId, Sequence[str]]
    vote_sets_complete: Collection[SaveId]
    packs: Mapping[SaveId, Mapping[str, float]]
    needed: Collection[str] | None
    """Packs that living checkpoints name; None if that could not be found out."""
    pinned: Collection[CheckpointId]
    expired_pins: Sequence[str]
    now_s: float
    """The latest time the store has put on anything: never later than its clock, so ages are never too large."""
    replaced: Collection[CheckpointId] = ()
    """Tombstones that replaced a commit record which was seen."""
    bare_since_s: Mapping[CheckpointId, float] = field(default_factory=dict)
    """Tombstones without votes and packs: since when that is known."""
    missing: Sequence[str] = ()
    """Keys of records that must be there and are not."""
    pins_unknown: bool = False
    """A pin cannot be read: nobody knows what it keeps."""


@dataclass
class Plan:
    """What one pass does, in this order."""

    retire: list[tuple[CheckpointId, str]] = field(default_factory=list)
    """Checkpoints (and saves that never became one) whose commit key gets a tombstone, and why."""
    delete: list[str] = field(default_factory=list)
    """Keys: votes before packs before tombstones."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What whoever made the rules should hear: they do not do what they say."""
    refused: list[CheckpointError] = field(default_factory=list)
    """What could not be deleted or overwritten, once it was carried out."""


def plan(
    view: View,
    keep: Keep | None,
    in_flight: Collection[SaveId],
    grace_s: float,
    abandoned: bool = False,
    stopped: bool = False,
) -> Plan:
    """Decide one pass. keep None: no checkpoint is retired, only debris.

    in_flight: saves of the caller that are under way. abandoned: retire the branches outside of the history too. stopped: nothing else
    writes here, by a person's word: unfinished saves of the newest epoch are debris as well.
    """
    result = Plan()
    if view.missing:
        shown = f"{', '.join(view.missing[:5])}{' …' if len(view.missing) > 5 else ''}"
        result.warnings.append(
            f"nothing is removed: records are missing ({shown}), so what the others need is not known. Did a lifecycle rule of the bucket "
            "delete by age? `fastckpt check` lists what is there, `fastckpt check --repair` puts back what can be"
        )
        return result
    flying = {save.checkpoint for save in in_flight}
    if keep is not None and view.pins_unknown:
        result.notes.append("no checkpoint is retired: a pin cannot be read, so what it keeps is not known")
    elif keep is not None:
        doomed = [(c, "retention") for c in retire(view.history, keep)]
        without_measure = _without_measure(view.history, keep)
        if without_measure is not None:
            result.warnings.append(without_measure)
        if abandoned:
            inside = {c.checkpoint for c in view.history}
            doomed += [(c, "abandoned branch") for c in view.living if c not in inside]
        for checkpoint, why in doomed:
            if checkpoint in view.pinned:
                result.notes.append(f"checkpoint {checkpoint} stays: somebody has pinned it")
            elif checkpoint not in flying:
                result.retire.append((checkpoint, why))
    # Unfinished saves. What could still be completed and would be newer than all else is left alone.
    head = view.history[0].checkpoint if view.history else None
    known = view.living.keys() | view.tombstones.keys() | set(view.unreadable)
    unfinished = {save.checkpoint for save in (*view.votes, *view.packs)} - known - flying
    completable = {save.checkpoint for save in view.vote_sets_complete}
    for checkpoint in sorted(unfinished):
        over = checkpoint.epoch < view.newest_epoch or stopped or (head is not None and checkpoint < head)
        useful = checkpoint in completable and (head is None or checkpoint > head)
        if over and not useful:
            result.retire.append((checkpoint, UNFINISHED))
    dead = {checkpoint: view.tombstones[checkpoint] for checkpoint in view.tombstones}
    gone = dead.keys() | {checkpoint for checkpoint, _ in result.retire}

    def age_s(save: SaveId) -> float | None:
        """Since when a save is not needed for its own sake; None: it is."""
        if save in in_flight:
            return None
        if save.checkpoint in dead:
            return view.now_s - dead[save.checkpoint]
        commit = view.living.get(save.checkpoint)
        if commit is not None and commit.save != save:  # another try of it was committed
            return view.now_s - view.commit_times_s.get(save.checkpoint, view.now_s)
        return None

    for save, names in sorted(view.votes.items()):
        age = age_s(save)
        if save not in in_flight and (save.checkpoint in gone or (age is not None and age >= grace_s)):
            result.delete += names
    left: set[CheckpointId] = set()
    for save, packs in sorted(view.packs.items()):
        age = age_s(save)
        for key in sorted(packs):
            if view.needed is None or key in view.needed:
                left.add(save.checkpoint)
            elif age is not None and age >= grace_s:
                result.delete.append(key)
            else:
                left.add(save.checkpoint)
    if view.needed is None:
        result.notes.append(
            "no pack is deleted: a living checkpoint cannot be read, so what it needs is not known. Try `fastckpt check`"
        )
    for checkpoint, written_s in sorted(view.tombstones.items()):
        if checkpoint in left:
            continue
        if checkpoint.epoch < view.newest_epoch or stopped:
            over_s: float | None = written_s
        else:
            over_s = view.bare_since_s.get(checkpoint) if checkpoint in view.replaced else None
        if over_s is not None and view.now_s - over_s >= grace_s:
            result.delete.append(keys.commit_key(checkpoint))
    result.delete += view.expired_pins
    return result


class PassInterrupted(Exception):
    """A pass ended before its next request, as its caller wished. What it did stands, and the next one goes on from there."""


class _Gate(Wrapper):
    """Asks before every request whether the pass is to go on."""

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
        """Seen by the pass before, or committed since, and not retired here."""
        self._bare: dict[CheckpointId, tuple[float, float | None]] = {}
        """Tombstones without votes and packs: `now_s` of the pass that saw it first, and of the first later one for which the store's clock
        had gone on: that is after the last of them was deleted."""
        self._refused: set[str] = set()
        """Keys that could not be deleted or overwritten. Not tried again: each try would be one more request of every pass."""

    def interrupt_when(self, interrupted: Callable[[], bool]) -> None:
        """From now on passes end with PassInterrupted before the first request at which this is true."""
        self._store.interrupted = interrupted

    def know(self, commit: Commit, packs: Collection[str]) -> None:
        """A commit whose packs the caller knows: its index need not be read. Any thread."""
        self._needed_by[commit.checkpoint, commit.digest] = frozenset(packs)

    def look(self) -> View:
        """Read what a plan needs: five LISTs, and the records and file tables not seen before. StoreError, PassInterrupted."""
        # Data is listed before commits: a save that commits in between has its packs in neither or in both, never packs alone.
        packs: dict[SaveId, dict[str, float]] = {}
        votes: dict[SaveId, list[str]] = {}
        names: dict[SaveId, list[VoteName]] = {}
        times = [0.0]
        for info in self._store.list(keys.DATA):
            save = keys.parse_pack(info.key)
            if save is not None:
                packs.setdefault(save, {})[info.key] = info.modified_s
                times.append(info.modified_s)
        for info in self._store.list(keys.VOTES):
            name = keys.parse_vote(info.key)
            if name is not None:
                votes.setdefault(name.save, []).append(info.key)
                names.setdefault(name.save, []).append(name)
                times.append(info.modified_s)
        catalog = Catalog(self._repository)
        found = self._repository.read_all(catalog.listing)
        commits, tombstones = found.commits, found.tombstones
        times += catalog.listing.modified_s.values()
        needed: set[str] | None = None if found.failed or found.missing else set()
        for commit in commits.values():
            if needed is not None:
                packs_of = self._needed(commit)
                needed = None if packs_of is None else needed | packs_of
        now_s = max(times)
        pinned, expired, pins_unknown = self._pins(now_s)
        there = {save.checkpoint for save in (*votes, *packs)}
        missing = self._missing(catalog, commits, there)
        self._forget(commits, {*catalog.listing.infos, *expired, *_all(votes), *_all(packs)})
        return View(
            newest_epoch=max(catalog.listing.epochs, default=0),
            history=[] if missing else [Candidate(c, commits[c].metrics) for c in catalog.history() if c in commits],
            living=commits,
            tombstones={c: catalog.listing.modified_s.get(c, 0.0) for c in tombstones},
            commit_times_s=catalog.listing.modified_s,
            unreadable={*found.failed, *found.missing},
            votes=votes,
            vote_sets_complete={save for save, those in names.items() if _complete(those)},
            packs=packs,
            needed=needed,
            pinned=pinned,
            expired_pins=expired,
            now_s=now_s,
            replaced={c for c, tombstone in tombstones.items() if tombstone.of is not None},
            bare_since_s=self._bare_since_s(tombstones.keys() - there, now_s),
            missing=missing,
            pins_unknown=pins_unknown,
        )

    def _missing(
        self, catalog: Catalog, commits: Mapping[CheckpointId, Commit], there: Collection[CheckpointId]
    ) -> list[str]:
        epochs = {c.epoch for c in commits} - set(catalog.listing.epochs)
        gone = {c for c in self._living - set(catalog.listing.commits) if c in there}
        self._living = gone | commits.keys()
        return [*map(keys.epoch_key, sorted(epochs)), *map(keys.commit_key, sorted(gone))]

    def _forget(self, commits: Mapping[CheckpointId, Commit], listed: set[str]) -> None:
        """What is not there any more, or memory would follow the age of the run."""
        living = {(c, commit.digest) for c, commit in commits.items()}
        self._needed_by = {key: packs for key, packs in self._needed_by.copy().items() if key in living}
        self._refused &= listed

    def _bare_since_s(self, bare: Collection[CheckpointId], now_s: float) -> dict[CheckpointId, float]:
        before, self._bare = self._bare, {}
        for checkpoint in bare:
            first_s, since_s = before.get(checkpoint, (now_s, None))
            self._bare[checkpoint] = first_s, now_s if since_s is None and now_s > first_s else since_s
        return {checkpoint: since_s for checkpoint, (_, since_s) in self._bare.items() if since_s is not None}

    def _needed(self, commit: Commit) -> frozenset[str] | None:
        key = commit.checkpoint, commit.digest
        if key not in self._needed_by:
            try:
                readers = [open_vote(self._store, commit.vote(rank)) for rank in range(commit.world)]
            except StoreError as error:
                if not isinstance(error, ObjectNotFoundError):
                    raise
                return None
            except CheckpointError:
                return None
            self._needed_by[key] = frozenset(file.key for reader in readers for file in reader.files)
        return self._needed_by[key]

    def _pins(self, now_s: float) -> tuple[set[CheckpointId], list[str], bool]:
        """Checkpoints that are pinned, keys of expired pins, and whether one could not be read."""
        pinned, expired, unknown = set(), [], False
        for name, info in self._repository.pins().items():
            try:
                pin = self._repository.pin(name)
            except ObjectNotFoundError:
                continue
            except StoreError:
                raise
            except CheckpointError:
                unknown = True
                continue
            if now_s - info.modified_s > pin.expires_s:
                expired.append(info.key)
            else:
                pinned.add(pin.checkpoint)
        return pinned, expired, unknown

    def run(
        self,
        todo: Plan,
        as_epoch: int | None,
        in_flight: Callable[[], Collection[SaveId]] = tuple,
    ) -> list[CheckpointError]:
        """Carry out a plan. as_epoch: the caller's epoch; nothing is done unless it is the newest. None: a person says that the
        run is stopped. in_flight: the caller's saves under way, asked again before anything goes.

        Returns what could not be deleted or overwritten, each once: it is passed over from then on.
        Safe to stop anywhere and to begin again. StoreError, PassInterrupted.
        """
        refused: list[CheckpointError] = []
        if not todo.retire or not self._may_go_on(as_epoch):
            blocked = {checkpoint for checkpoint, _ in todo.retire}
        else:
            flying = {save.checkpoint for save in in_flight()}
            blocked = {c for c, why in todo.retire if c in flying or not self._bury(c, why, refused)}
        for batch in _batches([key for key in todo.delete if key not in self._refused]):
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
        return refused

    def _held(self) -> set[CheckpointId | None]:
        """Checkpoints whose votes or packs cannot be deleted: their tombstones stay, or they would count as unfinished saves again."""
        saves = (keys.parse_pack(key) or getattr(keys.parse_vote(key), "save", None) for key in self._refused)
        return {save.checkpoint for save in saves if save is not None}

    def _may_go_on(self, as_epoch: int | None) -> bool:
        return as_epoch is None or self._repository.newest_epoch() == as_epoch

    def _try(self, key: str, refused: list[CheckpointError], act: Callable[[], object]) -> bool:
        """False if it was refused: one object that cannot go, or one record that cannot be read, keeps no other."""
        try:
            act()
        except StoreUnavailableError:  # the store, not the object
            raise
        except CheckpointError as error:
            self._refused.add(key)
            refused.append(error)
            return False
        return True

    def _bury(self, checkpoint: CheckpointId, why: str, refused: list[CheckpointError]) -> bool:
        key, stands = keys.commit_key(checkpoint), False

        def act() -> None:
            nonlocal stands
            stands = self._put_tombstone(checkpoint, key, why)

        return key not in self._refused and self._try(key, refused, act) and stands

    def _put_tombstone(self, checkpoint: CheckpointId, key: str, why: str) -> bool:
        """False if an unfinished save turned out to be committed: then it stays."""
        try:
            found: Commit | Tombstone | None = Repository.commit(self._repository, checkpoint)  # as it is now
        except ObjectNotFoundError:
            found = None
        if isinstance(found, Tombstone):
            return True
        if (found is None) != (why == UNFINISHED):  # not what the plan was made for
            return False
        of = None if found is None else found.digest
        data = tombstone_bytes(Tombstone(checkpoint, of, why, utc_now()))
        if found is None:
            if create(self._store, key, data) != data:
                return False
        else:
            self._store.put(key, data)
        self._living.discard(checkpoint)
        events.emit(events.Retired(target=self._store.url, epoch=checkpoint.epoch, step=checkpoint.step, why=why))
        return True


def _batches(all_keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (all_keys[at : at + _BATCH] for at in range(0, len(all_keys), _BATCH))


def _all(of_saves: Mapping[SaveId, Iterable[str]]) -> Iterator[str]:
    return (key for some in of_saves.values() for key in some)


def _complete(names: Iterable[VoteName]) -> bool:
    found = list(names)
    return {name.rank for name in found} == set(range(found[0].world))


__all__ = ["GRACE_S", "Candidate", "Collector", "Keep", "PassInterrupted", "Plan", "View", "plan", "retire"]
