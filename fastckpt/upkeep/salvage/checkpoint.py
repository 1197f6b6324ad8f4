"""Salvages one checkpoint, rank by rank.

The packs are read twice: once to find the good chunks, once to write them. So no whole tensor is ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastckpt._types import Progress
from fastckpt.errors import NoCheckpointError
from fastckpt.format.keys import CheckpointId
from fastckpt.options import Options
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.upkeep.salvage.chunks import bad_chunks
from fastckpt.upkeep.salvage.elsewhere import Elsewhere
from fastckpt.upkeep.salvage.report import SalvagedRank, SalvageReport, write_report
from fastckpt.upkeep.salvage.tensors import sort_out, write_tensors
from fastckpt.upkeep.salvage.votes import Votes, find_votes, open_index, with_shares


def salvage(
    repository: Repository,
    checkpoint: CheckpointId,
    directory: str,
    *,
    ranks: Sequence[int] | None = None,
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> SalvageReport:
    """Write every tensor that verifies to `directory`/rank-00000.fckpt …, and a report of the others to `directory`/report.json.

    Each file is a container of {dotted name: tensor}. Existing files of these names are replaced. The repository is not changed. Takes
    12 MiB for each of `options.threads` and 64 MiB more, and the index of one rank. Damage is reported, never raised.

    Args:
        ranks: None for all.
        options: None for the defaults. `max_load_bytes` bounds what one rank may unpack to.
        progress: called with chunks done and chunks in all, anew for each rank.

    Raises:
        NoCheckpointError: nothing is left of the checkpoint, it was retired, or it has no such rank.
        TooLargeError: a rank would unpack to more than the limit.
        StoreError: the store does not answer. A missing object is reported.
        OSError, SaveError: the directory cannot be written to.
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
    elsewhere = Elsewhere(repository, checkpoint, votes.world, options)
    for rank in wanted:
        path = os.path.join(directory, f"rank-{rank:05}.fckpt")
        report.ranks.append(_salvage_rank(repository.store, votes, rank, path, elsewhere, options, progress))
    write_report(os.path.join(directory, "report.json"), report)
    return report


def _salvage_rank(
    store: Store,
    votes: Votes,
    rank: int,
    path: str,
    elsewhere: Elsewhere,
    options: Options,
    progress: Progress,
) -> SalvagedRank:
    result = SalvagedRank(rank)
    opened = open_index(store, votes.names.get(rank))
    result.notes += opened.why
    result.object_whole = not opened.why
    reader = opened.reader
    if reader is None:
        result.lost_whole = True
        result.lost = elsewhere.expected(rank, opened.why)
    else:
        reader, missing = with_shares(store, votes, reader)
        bad = bad_chunks(reader, range(len(reader.records)), options.threads, progress)
        good = sort_out(reader, bad, missing, result)
        if good:
            write_tensors(reader, good, path, result, options)
    elsewhere.find(rank, result.lost)
    return result
