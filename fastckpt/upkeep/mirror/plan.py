"""Decides whether one repository may be mirrored onto another, and what of it. Pure, except for `select`, which reads records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastckpt.errors import CheckpointError, NoCheckpointError, RepositoryError
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit, Marker, metrics_to_json
from fastckpt.repository.catalog import Catalog


@dataclass(frozen=True, kw_only=True)
class MirrorAsked:
    """Which checkpoints are copied; by default the history, all that a restore may take."""

    step: int | None = None
    """The checkpoint of this step alone."""
    epoch: int | None = None
    """Of this epoch, where several have the step."""
    last: int | None = None
    """The newest of the history, so many."""
    branches: bool = False
    """Abandoned branches, too."""
    prune: bool = False
    """Retire at the target what the source has retired."""
    contents: bool = False
    """Read and compare what the target has already."""


@dataclass
class MirrorReport:
    """What was done, for people and for `--json`."""

    source: str
    target: str
    repository: str = ""
    """The target's id."""
    origin: str = ""
    """The source's id."""
    copied: list[CheckpointId] = field(default_factory=list)
    present: list[CheckpointId] = field(default_factory=list)
    """They were committed at the target by an earlier run; with `contents`, every object was compared."""
    left_out: list[tuple[CheckpointId, str]] = field(default_factory=list)
    """With the reason: nothing is damaged."""
    failed: list[tuple[CheckpointId, CheckpointError]] = field(default_factory=list)
    """The source cannot give them."""
    retired: list[CheckpointId] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    """Keys of objects at the target that were damaged, and were put again."""
    sent_objects: int = 0
    sent_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def require_related(source: Marker, target: Marker, source_url: str, target_url: str) -> None:
    """RepositoryError unless the target is a copy of the source."""
    if source.repository == target.repository:
        raise RepositoryError(
            f"{target_url} is the same repository as {source_url} (both have the id {source.repository}), or was copied by other means. "
            "A mirror has an id of its own: name an empty place"
        )
    origin = target.origin
    if origin is not None and origin.repository == source.repository:
        return
    if source.origin is not None and source.origin.repository == target.repository:
        raise RepositoryError(
            f"{target_url} is the origin of {source_url}: a mirror goes from an origin to its copy. If {source_url} is to be the run from "
            "now on, mirror it to an empty place"
        )
    what = (
        "no copy of anything" if origin is None else f"a copy of another one: {origin.repository}, once at {origin.url}"
    )
    raise RepositoryError(
        f"{target_url} is a repository of its own ({target.repository}), {what}, and {source_url} has the id {source.repository}. Nothing "
        "was written; name an empty place"
    )


def require_not_gone_on(
    source: Mapping[int, bytes], target: Mapping[int, bytes], source_url: str, target_url: str
) -> None:
    """RepositoryError if the target has claims of its own. Both: epoch records by number."""
    own = sorted(number for number, record in target.items() if source.get(number) != record)
    if own:
        shown = f"{', '.join(map(str, own[:5]))}{' …' if len(own) > 5 else ''}"
        raise RepositoryError(
            f"{target_url} has gone on without {source_url}: the claim of epoch {shown} was made there (or the source has lost its own). "
            "They can be one history no more. Mirror to an empty place; or, if the run goes on from the copy, mirror that one"
        )


COMPACT = "compact"
"""The trigger of a checkpoint that was written again, in full."""


def is_compacted(found: Commit, source: Commit) -> bool:
    """Whether a checkpoint of a copy is that of the source, written in full: it says the same of everything but its bytes as stored."""
    same = ("world", "parent", "meta", "raw_bytes", "checkpoint")
    return (
        found.trigger == COMPACT
        and all(getattr(found, name) == getattr(source, name) for name in same)
        and metrics_to_json(found.metrics) == metrics_to_json(source.metrics)
    )


def select(catalog: Catalog, asked: MirrorAsked) -> list[CheckpointId]:
    """The checkpoints to copy, the most wanted first. NoCheckpointError: there is none; UnreadableError, StoreError."""
    url = catalog.repository.url
    inside = list(catalog.history())
    if asked.step is not None or asked.epoch is not None:
        for checkpoint in (*inside, *catalog.branches()):
            if asked.step in (None, checkpoint.step) and asked.epoch in (None, checkpoint.epoch):
                return [checkpoint]
        raise NoCheckpointError(f"{url} has no checkpoint of {_words(asked)}; `fastckpt ls` lists all")
    found = [*inside[: asked.last], *(catalog.branches() if asked.branches else ())]
    if not found:
        others = catalog.branches()
        more = f" in its history; {len(others)} outside of it come with --all" if others else ""
        raise NoCheckpointError(f"{url} has no checkpoint{more}: there is nothing to copy")
    return found


def _words(asked: MirrorAsked) -> str:
    step = [] if asked.step is None else [f"step {asked.step}"]
    return " of ".join([*step, *([] if asked.epoch is None else [f"epoch {asked.epoch}"])])


__all__ = ["COMPACT", "MirrorAsked", "MirrorReport", "is_compacted", "require_not_gone_on", "require_related", "select"]
