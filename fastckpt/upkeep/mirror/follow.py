"""Retires at a copy what its origin has no more: only if it is asked for, and never before a newer checkpoint of the origin is there."""

from __future__ import annotations

from fastckpt.errors import UnreadableError
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S, RepositoryView, plan_retention

WHY = "retired at the origin"


def follow(target: Repository, source: Catalog, notes: list[str]) -> list[CheckpointId]:
    """Retire, and collect what was retired a grace ago. Returns what was retired now.

    source: as it was listed before the copy. notes: what a person should know is added. StoreError.
    """
    collector = Collector(target)
    view = collector.look()
    kept = _at_source(source)
    doomed = _doomed(view, kept)
    todo = plan_retention(view, None, (), GRACE_S)
    # Debris of an earlier run that was killed: the next run may need it as long as the source has the checkpoint.
    todo.retire = [(c, why) for c, why in todo.retire if c not in kept] + [(c, WHY) for c in doomed]
    todo.refused = collector.run(todo, as_epoch=view.newest_epoch)
    notes += [*todo.warnings, *todo.notes, *map(str, todo.refused)]
    pinned = sorted(c for c in view.living if c in view.pins.checkpoints and c not in kept)
    notes += [f"checkpoint {c} stays at the copy: somebody has pinned it" for c in pinned]
    gone = collector.look().living
    return [c for c in doomed if c not in gone]


def _at_source(source: Catalog) -> set[CheckpointId]:
    """What the source has, or has in a state that cannot be read."""
    kept = set()
    for checkpoint in source.listing.commits:
        try:
            if isinstance(source.commit(checkpoint), Commit):
                kept.add(checkpoint)
        except UnreadableError:
            kept.add(checkpoint)
    return kept


def _doomed(view: RepositoryView, kept: set[CheckpointId]) -> list[CheckpointId]:
    """What the copy has and the source has not. Pure. What is newer than everything that both have stays: the source has lost it."""
    if view.missing or view.pins.unknown:
        return []
    newest = max((c for c in view.living if c in kept), default=None)
    gone = [c for c in sorted(view.living) if c not in kept and c not in view.pins.checkpoints]
    return [c for c in gone if newest is not None and c < newest]


__all__ = ["WHY", "follow"]
