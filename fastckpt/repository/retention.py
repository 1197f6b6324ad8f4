"""How checkpoints that no rule keeps are deleted: commit → tombstone → votes → packs (docs/guarantees.md, section 3).

Pure: a plan can be shown before it is carried out. `collector` reads and deletes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastckpt.errors import CheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.pack_ranges import PackRanges, split_key
from fastckpt.format.repository_records import Commit
from fastckpt.repository.keeping import Candidate, Keep, not_kept, without_measure
from fastckpt.repository.vote_set import VoteSetState

GRACE_S = 7200.0  # longer than any save, and than any request that is still on its way (assumption A1)
UNFINISHED = "unfinished save"


@dataclass(frozen=True)
class TombstoneSeen:
    """A tombstone, as a pass sees it. Times by the store's clock."""

    written_s: float
    replaced: bool = False
    """It replaced a commit record."""
    bare_since_s: float | None = None
    """The time since which it is known to have no votes and no packs; None: not known."""
    named: PackRanges | None = field(default_factory=dict)
    """Packs of other saves that the checkpoint named; None: not known."""


@dataclass(frozen=True)
class Pins:
    """Content of the pins of a repository."""

    checkpoints: Collection[CheckpointId] = ()
    expired: Sequence[str] = ()
    """Keys of the expired pins."""
    unknown: bool = False
    """A pin cannot be read: nobody knows what it keeps."""


@dataclass(frozen=True, kw_only=True)
class RepositoryView:
    """The content of a repository, as one pass of the collector sees it. Its 14 attributes are all the input of a pure plan."""

    newest_epoch: int
    history: Sequence[Candidate]
    """The history, newest first."""
    living: Mapping[CheckpointId, Commit]
    tombstones: Mapping[CheckpointId, TombstoneSeen]
    commit_times_s: Mapping[CheckpointId, float]
    unreadable: Collection[CheckpointId]
    votes: Mapping[SaveId, Sequence[str]]
    """Keys of votes, by save."""
    vote_sets: Mapping[SaveId, VoteSetState]
    packs: Mapping[SaveId, Collection[str]]
    """Keys of packs, by save."""
    needed: Collection[str] | None
    """Packs that living checkpoints name; None if that could not be read."""
    pins: Pins
    now_s: float
    """Newest modification time in the listing. It cannot be ahead of the store's clock, so no object looks older than it is."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of packs, by key."""
    missing: Sequence[str] = ()
    """Keys of records that must exist and do not."""


class HeldBytes(NamedTuple):
    """Packs of a repository."""

    stored: int = 0
    """Bytes of all packs."""
    base: int = 0
    """Of those, bytes of saves that are no checkpoint any more, in packs that a living checkpoint names. A pack is kept whole, however
    little of it is needed.
    """
    grace: int = 0
    """Bytes in packs that no checkpoint names, which wait for the end of their grace."""


@dataclass
class RetentionPlan:
    """The work of one pass, in this order."""

    retire: list[tuple[CheckpointId, str]] = field(default_factory=list)
    """Checkpoints (and saves that never became one) whose commit key gets a tombstone, and why."""
    delete: list[str] = field(default_factory=list)
    """Keys: votes before packs before tombstones."""
    notes: list[str] = field(default_factory=list)
    """Notes for a person who reads the plan."""
    warnings: list[str] = field(default_factory=list)
    """Warnings for the author of the rules: they do not have the effect that they seem to have."""
    refused: list[CheckpointError] = field(default_factory=list)
    """Errors of objects that could not be deleted or overwritten, after the plan was carried out."""
    held: HeldBytes = field(default_factory=HeldBytes)
    """What remains for other reasons than that a checkpoint has saved it, after the plan was carried out."""


def plan_retention(
    view: RepositoryView,
    keep: Keep | None,
    in_flight: Collection[SaveId],
    grace_s: float,
    abandoned: bool = False,
    stopped: bool = False,
) -> RetentionPlan:
    """Decide the work of one pass.

    keep: the rules; None: only debris is removed, no checkpoint. in_flight: saves of the caller that are under way. abandoned: retire the
    branches outside of the history too. stopped: a person says that nothing else writes here; then unfinished saves of the newest epoch are
    debris, too.
    """
    result = RetentionPlan()
    if view.missing:
        shown = f"{', '.join(view.missing[:5])}{' …' if len(view.missing) > 5 else ''}"
        result.warnings.append(
            f"nothing is removed: records are missing ({shown}), so what the others need is not known. Did a lifecycle rule of the bucket "
            "delete by age? `fastckpt check` lists what is there, `fastckpt check --repair` puts back what can be"
        )
        return result
    flying = {save.checkpoint for save in in_flight}
    _retire_checkpoints(result, view, keep, flying, abandoned)
    _retire_unfinished(result, view, flying, stopped)
    waits = _waiting_packs(view, in_flight)
    over = {save for save, seconds in _useless_for_s(view, in_flight).items() if seconds >= grace_s}
    gone = view.tombstones.keys() | {checkpoint for checkpoint, _ in result.retire}
    for save, names in sorted(view.votes.items()):
        if save not in in_flight and (save.checkpoint in gone or save in over):
            result.delete += names
    deleted = {key for key, seconds in waits.items() if seconds >= grace_s}
    if keep is not None and keep.max_grace_bytes is not None:
        deleted |= _too_much(view, waits, deleted, keep.max_grace_bytes)
    _delete_packs(result, view, deleted)
    left = {save.checkpoint for save, packs in view.packs.items() if not deleted.issuperset(packs)}
    _delete_tombstones(result, view, left, grace_s, stopped)
    result.delete += view.pins.expired
    rest = {save: [key for key in packs if key not in deleted] for save, packs in view.packs.items()}
    result.held = held_bytes(rest, view.sizes, view.needed, _useless_for_s(view, in_flight))
    return result


def _retire_checkpoints(
    result: RetentionPlan, view: RepositoryView, keep: Keep | None, flying: Collection[CheckpointId], abandoned: bool
) -> None:
    if keep is None:
        return
    if view.pins.unknown:
        result.notes.append("no checkpoint is retired: a pin cannot be read, so what it keeps is not known")
        return
    doomed = [(c, "retention") for c in not_kept(view.history, keep, view.now_s)]
    warning = without_measure(view.history, keep, view.now_s)
    if warning is not None:
        result.warnings.append(warning)
    if abandoned:
        inside = {c.checkpoint for c in view.history}
        doomed += [(c, "abandoned branch") for c in view.living if c not in inside]
    for checkpoint, why in doomed:
        if checkpoint in view.pins.checkpoints:
            result.notes.append(f"checkpoint {checkpoint} stays: somebody has pinned it")
        elif checkpoint not in flying:
            result.retire.append((checkpoint, why))


def _retire_unfinished(result: RetentionPlan, view: RepositoryView, flying: set[CheckpointId], stopped: bool) -> None:
    """Retire saves that never became a checkpoint. A save that would be newer than all checkpoints stays while it can be completed. It also
    stays while its votes contradict each other, because only a person can tell which are right.
    """
    head = view.history[0].checkpoint if view.history else None
    known = view.living.keys() | view.tombstones.keys() | set(view.unreadable)
    unfinished = {save.checkpoint for save in (*view.votes, *view.packs)} - known - flying
    states: dict[CheckpointId, set[VoteSetState]] = {}
    for save, state in view.vote_sets.items():
        states.setdefault(save.checkpoint, set()).add(state)
    for checkpoint in sorted(unfinished):
        newer = head is None or checkpoint > head
        found = states.get(checkpoint, set())
        if newer and VoteSetState.COMPLETE in found:
            continue
        if newer and VoteSetState.CONTRADICTORY in found and not stopped:
            result.notes.append(
                f"the save {checkpoint} stays, though nothing can be committed of it: its votes contradict each other. "
                "Save the step again; `fastckpt prune` removes these"
            )
        elif checkpoint.epoch < view.newest_epoch or stopped or not newer:
            result.retire.append((checkpoint, UNFINISHED))


def _useless_for_s(view: RepositoryView, in_flight: Collection[SaveId]) -> dict[SaveId, float]:
    """Saves that are not needed for their own sake → seconds since that is so."""
    found = {}
    for save in {*view.votes, *view.packs} - set(in_flight):
        tombstone = view.tombstones.get(save.checkpoint)
        commit = view.living.get(save.checkpoint)
        if tombstone is not None:
            found[save] = view.now_s - tombstone.written_s
        elif commit is not None and commit.save != save:  # another try of the step was committed
            found[save] = view.now_s - view.commit_times_s.get(save.checkpoint, view.now_s)
    return found


def _waiting_packs(view: RepositoryView, in_flight: Collection[SaveId]) -> dict[str, float]:
    """Packs that nothing needs → seconds since that is so: since its own save is not needed, and since the last checkpoint was retired that
    named it. Until then somebody may read it, or refer to it in a save that is not committed yet.
    """
    if view.needed is None:
        return {}
    named: dict[str, list[tuple[float, tuple[tuple[int, int], ...]]]] = defaultdict(list)
    unknown_s = -math.inf
    for tombstone in view.tombstones.values():
        if tombstone.named is None:
            unknown_s = max(unknown_s, tombstone.written_s)
        for folder, runs in (tombstone.named or {}).items():
            named[folder].append((tombstone.written_s, runs))
    found = {}
    for save, seconds in _useless_for_s(view, in_flight).items():
        for key in set(view.packs.get(save, ())) - set(view.needed):
            folder, number = split_key(key)
            since = [t for t, runs in named.get(folder, ()) if any(first <= number <= last for first, last in runs)]
            found[key] = min(seconds, view.now_s - max(since, default=-math.inf), view.now_s - unknown_s)
    return found


def _too_much(view: RepositoryView, waits: Mapping[str, float], deleted: Collection[str], cap: int) -> set[str]:
    """The packs of the newest epoch, longest useless first, that must go for no more than `cap` bytes to wait.

    Only an incarnation that has claimed a newer epoch since could refer to them, and it finds their checkpoints retired.
    """
    held = sum(view.sizes.get(key, 0) for key in waits if key not in deleted)
    found: set[str] = set()
    for key in sorted(waits.keys() - set(deleted), key=lambda key: (-waits[key], key)):
        save = keys.parse_pack(key)
        if held > cap and save is not None and save.epoch == view.newest_epoch:
            found.add(key)
            held -= view.sizes.get(key, 0)
    return found


def held_bytes(
    packs: Mapping[SaveId, Collection[str]],
    sizes: Mapping[str, int],
    needed: Collection[str] | None,
    useless: Collection[SaveId],
) -> HeldBytes:
    """What packs hold. needed: those that living checkpoints name; None: not known. useless: saves not needed for their own sake."""
    stored = base = grace = 0
    for save, some in packs.items():
        for key in some:
            n_bytes = sizes.get(key, 0)
            stored += n_bytes
            if save in useless and (needed is None or key in needed):
                base += n_bytes
            elif save in useless:
                grace += n_bytes
    return HeldBytes(stored, base, grace)


def _delete_packs(result: RetentionPlan, view: RepositoryView, deleted: Collection[str]) -> None:
    result.delete += [key for _, packs in sorted(view.packs.items()) for key in sorted(packs) if key in deleted]
    if view.needed is None:
        result.notes.append(
            "no pack is deleted: a living checkpoint cannot be read, so what it needs is not known. Try `fastckpt check`"
        )


def _delete_tombstones(
    result: RetentionPlan, view: RepositoryView, left: Collection[CheckpointId], grace_s: float, stopped: bool
) -> None:
    """Delete tombstones: the tombstone is the last object of its checkpoint."""
    for checkpoint, tombstone in sorted(view.tombstones.items()):
        if checkpoint in left:
            continue
        if checkpoint.epoch < view.newest_epoch or stopped:
            over_s: float | None = tombstone.written_s
        else:
            over_s = tombstone.bare_since_s if tombstone.replaced else None
        if over_s is not None and view.now_s - over_s >= grace_s:
            result.delete.append(keys.commit_key(checkpoint))


__all__ = [
    "GRACE_S",
    "UNFINISHED",
    "Candidate",
    "HeldBytes",
    "Keep",
    "Pins",
    "RepositoryView",
    "RetentionPlan",
    "TombstoneSeen",
    "held_bytes",
    "not_kept",
    "plan_retention",
]
