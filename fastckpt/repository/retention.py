"""Which checkpoints stay, and how the others are deleted: commit → tombstone → votes → packs (docs/guarantees.md, section 3).

Pure: a plan can be shown before it is carried out. `collector` reads and deletes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastckpt.errors import CheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.repository_records import Commit
from fastckpt.repository.vote_set import VoteSetState

GRACE_S = 7200.0  # longer than any save, and than any request that is still on its way (assumption A1)
UNFINISHED = "unfinished save"


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of the history stay: every checkpoint that at least one rule keeps. `Keep(last=1)` keeps the fewest.

    While no checkpoint has a value of the metric `best` (the name is mistyped, or nothing was measured yet), the best one is unknown: all
    checkpoints stay, with a warning.

    Args:
        last: How many of the newest checkpoints stay.
        every: Checkpoints stay whose step is a multiple of this.
        best: Name of a metric. The checkpoints with its best values stay; one without a value, or with NaN, is never best.
        mode: Which value is best, "min" or "max".
        best_count: How many of the best stay.

    Raises:
        ValueError: A rule makes no sense; all problems are listed.
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
    """A living checkpoint of the history, as input of `not_kept`."""

    checkpoint: CheckpointId
    metrics: Mapping[str, float]


def not_kept(history: Sequence[Candidate], keep: Keep) -> list[CheckpointId]:
    """The checkpoints that no rule keeps, never the newest one. history: newest first, in the order in which a restore tries them.

    Empty while a rule asks for the best checkpoint and nothing tells which it is (see `nothing_measured`): any of them may be the best.
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
    """Whether a rule keeps the best by a metric of which no checkpoint has a value."""
    return keep.best is not None and all(math.isnan(c.metrics.get(keep.best, math.nan)) for c in history)


def _without_measure(history: Sequence[Candidate], keep: Keep) -> str | None:
    """The warning for the case that `nothing_measured` keeps checkpoints that the other rules would not keep; else None."""
    if not history or not nothing_measured(history, keep) or not not_kept(history, replace(keep, best=None)):
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
class TombstoneSeen:
    """A tombstone, as a pass sees it. Times by the store's clock."""

    written_s: float
    replaced: bool = False
    """It replaced a commit record."""
    bare_since_s: float | None = None
    """The time since which it is known to have no votes and no packs; None: not known."""


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
    """The content of a repository, as one pass of the collector sees it. Its 13 attributes are all the input of a pure plan."""

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
    missing: Sequence[str] = ()
    """Keys of records that must exist and do not."""


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
    useless_for_s = {save: _useless_for_s(view, save) for save in (*view.votes, *view.packs) if save not in in_flight}
    over = {save for save, seconds in useless_for_s.items() if seconds is not None and seconds >= grace_s}
    gone = view.tombstones.keys() | {checkpoint for checkpoint, _ in result.retire}
    for save, names in sorted(view.votes.items()):
        if save not in in_flight and (save.checkpoint in gone or save in over):
            result.delete += names
    left = _delete_packs(result, view, over)
    _delete_tombstones(result, view, left, grace_s, stopped)
    result.delete += view.pins.expired
    return result


def _retire_checkpoints(
    result: RetentionPlan, view: RepositoryView, keep: Keep | None, flying: Collection[CheckpointId], abandoned: bool
) -> None:
    if keep is None:
        return
    if view.pins.unknown:
        result.notes.append("no checkpoint is retired: a pin cannot be read, so what it keeps is not known")
        return
    doomed = [(c, "retention") for c in not_kept(view.history, keep)]
    without_measure = _without_measure(view.history, keep)
    if without_measure is not None:
        result.warnings.append(without_measure)
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


def _useless_for_s(view: RepositoryView, save: SaveId) -> float | None:
    """Seconds for which a save has not been needed for its own sake; None: it is needed."""
    tombstone = view.tombstones.get(save.checkpoint)
    if tombstone is not None:
        return view.now_s - tombstone.written_s
    commit = view.living.get(save.checkpoint)
    if commit is not None and commit.save != save:  # another try of the step was committed
        return view.now_s - view.commit_times_s.get(save.checkpoint, view.now_s)
    return None


def _delete_packs(result: RetentionPlan, view: RepositoryView, over: Collection[SaveId]) -> set[CheckpointId]:
    """Delete packs. Returns the checkpoints of which some packs remain."""
    left: set[CheckpointId] = set()
    for save, packs in sorted(view.packs.items()):
        for key in sorted(packs):
            if view.needed is not None and key not in view.needed and save in over:
                result.delete.append(key)
            else:
                left.add(save.checkpoint)
    if view.needed is None:
        result.notes.append(
            "no pack is deleted: a living checkpoint cannot be read, so what it needs is not known. Try `fastckpt check`"
        )
    return left


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
