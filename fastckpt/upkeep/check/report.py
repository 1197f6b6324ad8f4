"""The report of a repository's check, and the builder that collects it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from fastckpt.errors import CorruptCheckpointError, Damage, ObjectNotFoundError, UnsupportedFormatError
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.repository_records import Pin
from fastckpt.format.shares import some_ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One problem that was found."""

    key: str
    damage: Damage
    """part: the kind of object (marker, epoch, commit, vote, pack, pin), or the part of a vote."""
    checkpoint: CheckpointId | None = None
    """The checkpoint that cannot be restored because of it. None: no checkpoint that was checked is harmed."""
    rank: int | None = None
    rank_lost: bool = False
    """All tensors of that rank are lost; their names are in the object that is damaged."""
    also_ranks: tuple[int, ...] = ()
    """Others that lose some of these tensors, as this rank writes them for all."""

    def __str__(self) -> str:
        whole = (
            ""
            if not self.rank_lost
            else " (affects every rank)"
            if self.rank is None
            else f" (all of rank {self.rank})"
        )
        also = f" (lost to {some_ranks(self.also_ranks)} as well)" if self.also_ranks else ""
        return f"{self.damage}{whole}{also}"


@dataclass
class CheckpointState:
    """A checkpoint, and whether it can be restored."""

    checkpoint: CheckpointId
    state: str
    """"ok", "damaged", "unsupported" (a newer fastckpt may read it), "retired" (while it was checked) or "not checked"."""
    branch: str
    """"history", "abandoned", or "unknown" where a damaged epoch record hides it."""
    tensors_lost: tuple[str, ...] = ()
    ranks_lost: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnfinishedSave:
    """A save without a commit record."""

    save: SaveId
    state: str
    """"completable", "incomplete" (votes are missing), "damaged", or "superseded" (another try of the step was committed, or the
    checkpoint that it refers to is gone)."""
    why: str
    votes: int
    world: int | None
    packs: int
    n_bytes: int
    """Size of its packs and votes together."""


@dataclass
class RepositoryReport:
    """All findings of a check. `ok` is True if everything was checked and is right. Its 13 attributes are members of `check --json`."""

    url: str
    quick: bool
    repository: str | None = None
    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """Sentences about objects that this version cannot read, and so cannot vouch for."""
    notes: list[str] = field(default_factory=list)
    """Sentences about facts that are not damage, but good to know."""
    checkpoints: list[CheckpointState] = field(default_factory=list)
    """Newest first."""
    unfinished: list[UnfinishedSave] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    history: tuple[CheckpointId, ...] = ()
    packs: int = 0
    """Number of packs that were read as a whole. `pack_bytes` and `chunks` count their content. 0 for a quick check."""
    pack_bytes: int = 0
    chunks: int = 0

    @property
    def ok(self) -> bool:
        return not self.findings and not self.not_checked


class ReportBuilder:
    """Collects the findings of one check's stages. One thread: workers hand their results to the thread that waits for them."""

    def __init__(self, report: RepositoryReport) -> None:
        self.report = report
        self._unsupported: set[CheckpointId] = set()

    def add(
        self,
        key: str,
        damage: Iterable[Damage],
        checkpoint: CheckpointId | None = None,
        *,
        rank: int | None = None,
        rank_lost: bool = False,
        also_ranks: tuple[int, ...] = (),
    ) -> None:
        """Enter damage of one object as findings."""
        self.report.findings += [Finding(key, item, checkpoint, rank, rank_lost, also_ranks) for item in damage]

    def add_unsupported(self, words: str, checkpoint: CheckpointId | None = None) -> None:
        """Report an object that only a newer version can read. checkpoint: the one that needs it."""
        self.report.not_checked.append(words)
        if checkpoint is not None:
            self._unsupported.add(checkpoint)

    def read(
        self,
        key: str,
        read: Callable[[], T],
        checkpoint: CheckpointId | None = None,
        *,
        rank: int | None = None,
        rank_lost: bool = False,
    ) -> T | None:
        """Return the result of `read`. If the object is missing, damaged or unsupported, report that and return None."""
        try:
            return read()
        except ObjectNotFoundError:
            missing = Damage(key.partition("/")[0], "as a whole", "an object", "none")
            self.add(key, [missing], checkpoint, rank=rank, rank_lost=rank_lost)
        except CorruptCheckpointError as error:
            self.add(key, error.damage, checkpoint, rank=rank, rank_lost=rank_lost)
        except UnsupportedFormatError as error:
            self.add_unsupported(str(error), checkpoint)
        return None

    def finish(
        self,
        checkpoints: Collection[CheckpointId],
        chosen: Collection[CheckpointId],
        inside: Collection[CheckpointId] | None,
        retired_since: Callable[[CheckpointId], bool],
    ) -> RepositoryReport:
        """Enter the state of every checkpoint, from the findings.

        chosen: the checked ones. inside: the history; None if it cannot be known. retired_since: asked for each damaged checkpoint; a
        running job's retention may delete a checkpoint while it is checked, and that is not damage.
        """
        report = self.report
        by_checkpoint: dict[CheckpointId, list[Finding]] = defaultdict(list)
        for finding in report.findings:
            if finding.checkpoint is not None:
                by_checkpoint[finding.checkpoint].append(finding)
        retired = {checkpoint for checkpoint in by_checkpoint if retired_since(checkpoint)}
        report.findings = [f for f in report.findings if f.checkpoint not in retired]
        for checkpoint in sorted(checkpoints, reverse=True):
            found = by_checkpoint.get(checkpoint, [])
            if checkpoint in retired:
                state, found = "retired", []
            elif found:
                state = "damaged"
            elif checkpoint in self._unsupported:
                state = "unsupported"
            else:
                state = "ok" if checkpoint in chosen else "not checked"
            branch = "unknown" if inside is None else "history" if checkpoint in inside else "abandoned"
            tensors = tuple(dict.fromkeys(name for f in found for name in f.damage.tensors))
            ranks = tuple(sorted({f.rank for f in found if f.rank_lost and f.rank is not None}))
            report.checkpoints.append(CheckpointState(checkpoint, state, branch, tensors, ranks))
        return report


__all__ = ["CheckpointState", "Finding", "ReportBuilder", "RepositoryReport", "UnfinishedSave"]
