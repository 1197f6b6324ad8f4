"""Opens the place that a copy is made at: nothing, or an earlier copy of the same source (docs/how-to/mirror.md)."""

from __future__ import annotations

from collections.abc import Mapping

from fastckpt.errors import RepositoryError
from fastckpt.format import keys
from fastckpt.format.keys import epoch_key
from fastckpt.format.repository_records import Marker, Origin
from fastckpt.repository.commit import create
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.mirror.plan import require_not_gone_on, require_related
from fastckpt.upkeep.mirror.records import AllRecords


def marker_of(source: Repository) -> Marker:
    """The marker of what is copied. RepositoryError if there is none; CorruptCheckpointError, StoreError."""
    marker = source.marker()
    if marker is None:
        raise RepositoryError(
            f"{source.url} is no fastckpt repository with a {keys.MARKER}: check the URL. If a lifecycle rule has deleted it, "
            "`fastckpt check --repair` makes it anew"
        )
    return marker


def open_copy(
    source: Marker, source_url: str, epochs: Mapping[int, bytes], target: Repository, connections: int
) -> tuple[Marker, AllRecords]:
    """Marker and records of the target, after its marker was made or compared and the source's epochs were put there.

    epochs: all epoch records of the source, by number. RepositoryError: the target is no copy of the source, or has gone on without it;
    nothing was written then.
    """
    marker = target.marker()
    records = AllRecords(target.store, connections)
    there = records.list()
    if marker is None and (there.commits or there.epochs):
        target.initialise()  # raises what says how to mend it
    if marker is not None:
        require_related(source, marker, source_url, target.url)
        require_not_gone_on(epochs, records.epochs(there), source_url, target.url)
    target.probe()
    if marker is None:
        marker = target.make_marker(Origin(source.repository, source_url))
        require_related(source, marker, source_url, target.url)  # somebody else's may have come first
    for number in sorted(epochs.keys() - set(there.epochs)):  # in order: a parent before its child
        found = create(target.store, epoch_key(number), epochs[number])
        require_not_gone_on(epochs, {number: found}, source_url, target.url)
    return marker, records


def require_still_a_copy(epochs: Mapping[int, bytes], target: Repository, source_url: str) -> None:
    """To be called right before a commit record: RepositoryError if somebody has gone on from the target meanwhile."""
    own: Mapping[int, bytes] = {number: b"" for number in target.list().epochs if number not in epochs}
    require_not_gone_on(epochs, own, source_url, target.url)


__all__ = ["marker_of", "open_copy", "require_still_a_copy"]
