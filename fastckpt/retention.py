"""Which checkpoints stay, and how the others go: commit → tombstone → votes → packs (docs/guarantees.md, section 3).

`retire` and `plan` are pure: what is decided can be shown before it is done. `Collector` reads and deletes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastckpt import events
from fastckpt.catalog import Catalog
from fastckpt.commit import create, list_votes, open_vote, read_sealed
from fastckpt.errors import CheckpointError, ObjectNotFoundError, StoreError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.format.repository_records import Commit, Tombstone, parse_pin, tombstone_bytes, utc_now
from fastckpt.repository import Repository

GRACE_S = 7200.0  # longer than any save and any request that is still on its way (assumption A1)


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


@dataclass
class Plan:
    """What one pass does, in this order."""

    retire: list[tuple[CheckpointId, str]] = field(default_factory=list)
    """Checkpoints (and saves that never became one) whose commit key gets a tombstone, and why."""
    delete: list[str] = field(default_factory=list)
    """Keys: votes before packs before tombstones."""
    waiting_bytes_keys: int = 0
    """Packs that will go once their grace is over."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What whoever made the rules should hear: they do not do what they say."""


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
    flying = {save.checkpoint for save in in_flight}
    if keep is not None:
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
            result.retire.append((checkpoint, "unfinished save"))
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
                result.waiting_bytes_keys += save.checkpoint in gone
    if view.needed is None:
        result.notes.append(
            "no pack is deleted: a living checkpoint cannot be read, so what it needs is not known. Try `fastckpt check`"
        )
    for checkpoint, written_s in sorted(view.tombstones.items()):
        over = checkpoint.epoch < view.newest_epoch or stopped
        if over and checkpoint not in left and view.now_s - written_s >= grace_s:
            result.delete.append(keys.commit_key(checkpoint))
    result.delete += view.expired_pins
    return result


class Collector:
    """Retention of one repository. One thread at a time. Keeps what it read of commits that cannot change."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._store = repository.store
        self._needed_by: dict[tuple[CheckpointId, str], frozenset[str]] = {}

    def look(self, catalog: Catalog | None = None) -> View:
        """Read what a plan needs: five LISTs, and the records and file tables not seen before. StoreError."""
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
        catalog = catalog or Catalog(self._repository)
        commits, tombstones, failed = self._repository.read_all(catalog.listing)
        times += catalog.listing.modified_s.values()
        needed: set[str] | None = None if failed else set()
        for commit in commits.values():
            if needed is not None:
                found = self._needed(commit)
                needed = None if found is None else needed | found
        pinned, expired = self._pins(max(times))
        return View(
            newest_epoch=max(catalog.listing.epochs, default=0),
            history=[Candidate(c, commits[c].metrics) for c in catalog.history() if c in commits],
            living=commits,
            tombstones={c: catalog.listing.modified_s.get(c, 0.0) for c in tombstones},
            commit_times_s=catalog.listing.modified_s,
            unreadable=set(failed),
            votes=votes,
            vote_sets_complete={save for save, found in names.items() if _complete(found)},
            packs=packs,
            needed=needed,
            pinned=pinned,
            expired_pins=expired,
            now_s=max(times),
        )

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

    def _pins(self, now_s: float) -> tuple[set[CheckpointId], list[str]]:
        pinned, expired = set(), []
        for info in self._store.list(keys.PINS):
            if keys.parse_pin(info.key) is None:
                continue
            try:
                pin = parse_pin(read_sealed(self._store, info.key), f"{self._store.url}/{info.key}")
            except ObjectNotFoundError:
                continue
            if now_s - info.modified_s > pin.expires_s:
                expired.append(info.key)
            else:
                pinned.add(pin.checkpoint)
        return pinned, expired

    def run(self, todo: Plan, as_epoch: int | None) -> None:
        """Carry out a plan. as_epoch: the caller's epoch; nothing is done unless it is the newest. None: a person says that the
        run is stopped.

        Safe to stop anywhere and to begin again. StoreError.
        """
        if as_epoch is not None and self._repository.newest_epoch() != as_epoch:
            return
        blocked: set[CheckpointId] = set()
        for checkpoint, why in todo.retire:
            if not self._bury(checkpoint, why):
                blocked.add(checkpoint)
        for key in todo.delete:
            vote = keys.parse_vote(key)
            if vote is None or vote.save.checkpoint not in blocked:
                self._store.delete(key)

    def _bury(self, checkpoint: CheckpointId, why: str) -> bool:
        """Put the tombstone. False if an unfinished save turned out to be committed: then it stays."""
        key = keys.commit_key(checkpoint)
        try:
            found: Commit | Tombstone | None = self._repository.commit(checkpoint)
        except ObjectNotFoundError:
            found = None
        if isinstance(found, Tombstone):
            return True
        if found is not None and why == "unfinished save":
            return False
        of = None if found is None else found.digest
        data = tombstone_bytes(Tombstone(checkpoint, of, why, utc_now()))
        if found is None:
            if create(self._store, key, data) != data:
                return False
        else:
            self._store.put(key, data)
        events.emit(events.Retired(target=self._store.url, epoch=checkpoint.epoch, step=checkpoint.step, why=why))
        return True


def _complete(names: Iterable[VoteName]) -> bool:
    found = list(names)
    return {name.rank for name in found} == set(range(found[0].world))


__all__ = ["GRACE_S", "Candidate", "Collector", "Keep", "Plan", "View", "list_votes", "plan", "retire"]
