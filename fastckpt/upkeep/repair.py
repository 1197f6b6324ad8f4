"""Repairs a repository: commits saves whose votes are all there, as the next start of the job would do, and makes missing records anew.

report of a check ─→ plan_repair ─→ repair
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastckpt.errors import CheckpointError, RepositoryError, StoreError
from fastckpt.format.keys import MARKER, CheckpointId, SaveId, epoch_key
from fastckpt.format.repository_records import Commit, Epoch, epoch_bytes
from fastckpt.repository.catalog import Catalog, history
from fastckpt.repository.commit import create, try_commit
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.check.report import RepositoryReport


@dataclass(frozen=True)
class Completion:
    """A save that can be committed, and the checkpoint's place afterwards."""

    save: SaveId
    becomes: str
    """"newest" (the next restore takes it), "history" or "abandoned"."""


@dataclass(frozen=True)
class RepairPlan:
    """The work of `repair`, and the problems that cannot be repaired."""

    complete: tuple[Completion, ...]
    left: tuple[str, ...]
    records: tuple[int, ...] = ()
    """Numbers of epochs whose records will be made anew; 0 stands for the marker. Only records that commits need."""


def plan_repair(report: RepositoryReport, epoch_of: Callable[[int], Epoch | None], newest_epoch: int) -> RepairPlan:
    """Decide which saves to commit: the oldest first, one try of each step. Pure, except that `epoch_of` may read."""
    complete: dict[CheckpointId, SaveId] = {}
    for unfinished in sorted(report.unfinished, key=lambda one: one.save):
        if unfinished.state == "completable":
            complete.setdefault(unfinished.save.checkpoint, unfinished.save)
    living = [one.checkpoint for one in report.checkpoints if one.state != "retired"]
    newest = max([newest_epoch, *(c.epoch for c in (*living, *complete))], default=0)
    try:
        inside = list(history(newest, epoch_of, [*living, *complete]))
    except CheckpointError:
        inside = []
    completions = []
    for checkpoint, save in complete.items():
        place = "newest" if inside[:1] == [checkpoint] else "history" if checkpoint in inside else "abandoned"
        completions.append(Completion(save, place))
    damaged = [one.checkpoint for one in report.checkpoints if one.state == "damaged"]
    left = [f"checkpoint {c} is damaged: `fastckpt salvage` gets out what can be read" for c in damaged]
    lost = {finding.key for finding in report.findings if finding.damage.found in ("none", "no such object")}
    records = [number for number in sorted({c.epoch for c in living}) if epoch_key(number) in lost]
    return RepairPlan(tuple(completions), tuple(left), (*([0] if living and MARKER in lost else []), *records))


@dataclass(frozen=True)
class Repaired:
    """The outcome of one completion."""

    save: SaveId
    commit: Commit | None
    error: str | None


def repair(repository: Repository, plan: RepairPlan) -> list[Repaired]:
    """Carry out a plan. A failure is listed, and the other steps are still done. May be stopped anywhere and started again.

    StoreAccessError and other errors of the store are raised, because they would hit the other steps, too.
    """
    for number in plan.records:
        if not number:
            repository.make_marker()
            continue
        catalog = Catalog(repository)
        epoch = catalog.stand_in(number)
        if epoch is None:  # the epoch's oldest commits are gone, so its parent is unknown
            newer = next((c for c in catalog.listing.commits if c.epoch == number), None)
            raise RepositoryError(
                f"{repository.url}/{epoch_key(number)} cannot be made again: what its oldest checkpoint {newer} continued from is not "
                "known. Nothing is retired while it is missing; go on in a new repository, or remove that epoch's checkpoints"
            )
        create(repository.store, epoch_key(number), epoch_bytes(epoch))
    done = []
    for completion in plan.complete:
        try:
            commit = try_commit(repository.store, completion.save)
            error = None if commit is not None else "a vote is missing now"
        except StoreError:
            raise
        except CheckpointError as problem:
            commit, error = None, str(problem)
        done.append(Repaired(completion.save, commit, error))
    return done
