"""Checks a repository: every record, every vote, every byte of every pack, and objects that do not belong there.

    LIST ─→ records ─→ votes (indexes, lengths of packs) ─→ packs, each once: crc64nvme of the whole, every chunk decoded ─→ report

A check changes nothing; repair.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from fastckpt.options import Options
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.check.packs import check_packs
from fastckpt.upkeep.check.records import (
    check_marker,
    check_parents,
    check_pins,
    history_of,
    is_retired,
    read_records,
)
from fastckpt.upkeep.check.report import ReportBuilder, RepositoryReport
from fastckpt.upkeep.check.unfinished import check_unfinished, note_leftovers
from fastckpt.upkeep.check.votes import check_votes


def check_repository(
    repository: Repository,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    steps: Collection[int] | None = None,
    quick: bool = False,
    options: Options | None = None,
) -> RepositoryReport:
    """Read and verify everything in a repository. Damage is reported, never raised.

    Takes `options.threads` × (one pack + 8 MiB), one checkpoint's indexes, and some 100 bytes for each chunk of the repository.

    Args:
        progress: called on this thread with the bytes of packs that are read and the bytes of all of them.
        steps: check only checkpoints of these steps; None for all. Records are read in any case.
        quick: check packs by their length only.
        options: None for the defaults.

    Raises:
        StoreError: the store does not answer. A missing object is reported.
    """
    store = repository.store
    found = ReportBuilder(RepositoryReport(repository.url, quick))
    # One LIST in the order of keys: commits before data before votes. So the packs of each listed commit are listed, too.
    inventory = take_inventory(store)
    sizes = inventory.sizes
    check_marker(store, inventory, found)
    read = read_records(repository, inventory, found)
    check_parents(read, found)
    check_pins(store, inventory, read, found)
    inside = history_of(inventory, read)
    found.report.history = tuple(inside or ())

    chosen = [commit for commit in read.commits.values() if steps is None or commit.save.step in steps]
    named: set[str] = set()
    for commit in chosen:
        named |= check_votes(store, commit, sizes, found)
    if not quick:
        needed_bytes = sum(sizes.get(key, 0) for key in named)
        check_packs(store, chosen, sizes, needed_bytes, options or Options(), found, progress)

    named = check_unfinished(repository, inventory, read, named, found)
    note_leftovers(inventory, read, named, steps is None, found)
    return found.finish(
        checkpoints=[*read.commits, *read.unreadable],
        chosen={commit.checkpoint for commit in chosen},
        inside=inside,
        retired_since=lambda checkpoint: is_retired(repository, checkpoint),
    )


__all__ = ["check_repository"]
