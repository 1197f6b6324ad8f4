"""Recordings → saves and loads: the time of each, stage by stage, and the stage that limited the others. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastckpt.trace.parsing import Recorded, Recording
from fastckpt.trace.stages import COMMIT, ENCODE, STAGE, STAGES, STALL, UPLOAD, Span, covered_s, raw_span, span_of

_ALIKE = 0.85  # stages that worked at least this share of the longest one's time are named with it
_STEP_IN_TARGET = re.compile(r"(.*) step (\d{1,15})")
_OF_SAVES = frozenset(
    [
        "SnapshotStarted",
        "PieceStaged",
        "SnapshotStaged",
        "SnapshotDropped",
        "FenceWaited",
        "SaveStarted",
        "ChunkEncoded",
        "ChunkStored",
        "PackStored",
        "DeltasUsed",
        "SaveFinished",
        "SaveFailed",
        "Committed",
        "CheckpointDurable",
    ]
)

OUTCOMES = ("equal", "difference", "cast", "full")
"""What becomes of a chunk in a save that has a base, as `events.DeltasUsed` names it."""
_TICK_S = (
    1e-9  # smallest step of the recording's clock; a shorter time could give an infinite speed, which JSON cannot hold
)


@dataclass
class _Marks:
    """What has been seen of a save."""

    has_snapshot: bool = False
    started: bool = False
    in_packs: bool = False
    last_put_s: float = 0.0


@dataclass
class Save:
    """One try to save. Spans are in seconds since the epoch, on any thread. What is told of it is what `fastckpt trace --json` has."""

    process: str
    target: str
    step: int | None
    """None: the save of a container."""
    start_s: float
    end_s: float
    state: str = "unfinished"
    """unfinished, uploaded (its vote is placed), written (a container, durable if at a path), durable (acknowledged) or failed."""
    raw_bytes: int = 0
    stored_bytes: int = 0
    error: str = ""
    spans: dict[str, list[Span]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    marks: _Marks = field(default_factory=_Marks)
    against: dict[str, int] = field(default_factory=dict)
    """Raw bytes of chunks by what became of them against the checkpoint before: equal, difference, cast, full. Empty: there was none."""
    why_full: str = ""
    """Why there was none although there should have been."""

    @property
    def seconds(self) -> float:
        """From its first event to its last one."""
        return self.end_s - self.start_s

    def busy_s(self, stage: str) -> float:
        """Seconds of a stage, summed over threads."""
        return sum(span.seconds for span in self.spans[stage])

    def wall_s(self, stage: str) -> float:
        """Seconds in which at least one thread was in the stage."""
        return covered_s(self.spans[stage])

    def speed(self, stage: str) -> float | None:
        """Bytes a second of a stage's wall time: stored bytes for uploads, raw bytes for other stages. None if nothing was measured."""
        wall_s = self.wall_s(stage)
        n_bytes = self.stored_bytes if stage in (UPLOAD, COMMIT) else self.raw_bytes
        return n_bytes / wall_s if wall_s >= _TICK_S and stage not in (STALL, COMMIT) else None

    @property
    def bottleneck(self) -> str:
        """The stage to speed up first, in words; "" if nothing was measured."""
        working = (STAGE, ENCODE, UPLOAD, COMMIT)
        walls = {stage: self.wall_s(stage) for stage in working}
        longest = max(walls.values())
        if longest <= 0 or self.seconds <= 0:
            return ""
        idle_s = self.seconds - covered_s(span for stage in working for span in self.spans[stage])
        if idle_s > longest:
            return f"none at work for {idle_s:.3g} of {self.seconds:.3g} s: earlier saves, or what is not recorded"
        names = sorted((s for s in working if walls[s] >= _ALIKE * longest), key=lambda s: -walls[s])
        details = f"{longest:.3g} of {self.seconds:.3g} s"
        first = names[0]
        if first in (ENCODE, UPLOAD):
            what = "threads" if first == ENCODE or not self.marks.in_packs else "puts"
            details += f", {self.busy_s(first) / walls[first]:.1f} {what} at once"
        return f"{' and '.join(names)} ({details})"


@dataclass(frozen=True)
class Load:
    """One load that ended."""

    process: str
    source: str
    start_s: float
    end_s: float
    raw_bytes: int


@dataclass
class Summary:
    """Saves and loads of all recordings."""

    saves: list[Save] = field(default_factory=list)
    """Ordered by their beginnings."""
    loads: list[Load] = field(default_factory=list)
    other_stall_s: float = 0.0
    """Seconds for which training threads waited outside of the saves above."""
    deferred: int = 0
    """Steps at which a save was due and had to wait for earlier ones."""


def summarize(recordings: Iterable[Recording]) -> Summary:
    """Group the events of each process by save."""
    summary = Summary()
    for recording in recordings:
        _Grouping(recording, summary).run()
    summary.saves.sort(key=lambda save: save.start_s)
    summary.loads.sort(key=lambda load: load.start_s)
    return summary


class _Grouping:
    """Groups the events of one process into saves."""

    def __init__(self, recording: Recording, summary: Summary) -> None:
        self._recording = recording
        self._summary = summary
        self._current: dict[tuple[str, int | None], Save] = {}

    def run(self) -> None:
        for event in self._recording.events:
            if event.kind in _OF_SAVES:
                self._take(event)
            elif event.kind == "SaveDeferred":
                self._summary.deferred += 1
            elif event.kind == "LoadFinished":
                span = span_of(event)
                self._summary.loads.append(
                    Load(self._recording.label, event.text("source"), *span, event.n_bytes("raw_bytes"))
                )

    def _take(self, event: Recorded) -> None:
        target, step = event.text("target"), event.step()
        found = _STEP_IN_TARGET.fullmatch(target)
        if found is not None:  # an upload of one rank
            target, step = found[1], int(found[2])
        save = self._current.get((target, step))
        if event.kind == "FenceWaited" and save is None:
            self._summary.other_stall_s += event.seconds()
            return
        if save is None or _begins_anew(event.kind, save):
            save = Save(self._recording.label, target, step, event.end_s, event.end_s)
            self._current[target, step] = save
            self._summary.saves.append(save)
        _add(save, event)


def _begins_anew(kind: str, save: Save) -> bool:
    if kind == "SnapshotStarted":
        return True
    return kind == "SaveStarted" and (save.marks.started or save.state != "unfinished")


def _add(save: Save, event: Recorded) -> None:
    kind, span = event.kind, span_of(event)
    if kind == "FenceWaited":
        save.spans[STALL].append(span)
        return  # may come long after the save: not part of its time
    save.end_s = max(save.end_s, event.end_s)
    save.raw_bytes = max(save.raw_bytes, event.n_bytes("raw_bytes"))
    match kind:
        case "SnapshotStarted":
            save.marks.has_snapshot = True
        case "PieceStaged":
            save.spans[STAGE].append(span)
        case "SnapshotStaged":
            save.marks.has_snapshot = True
            if not save.spans[STAGE]:
                save.spans[STAGE].append(span)
        case "SaveStarted":
            save.marks.started = True
            span = span_of(event, "skeleton_s")
            if span.seconds and not save.marks.has_snapshot:
                save.spans[STAGE].append(span)
        case "ChunkEncoded":
            save.spans[ENCODE].append(span)
            raw = raw_span(event)
            if (
                raw.seconds > 0 and not save.marks.has_snapshot
            ):  # with a step it is the wait for a piece, which has a span of its own
                save.spans[STAGE].append(raw)
        case "ChunkStored":
            span = span_of(event, "write_s")
            if save.step is None:  # in a repository it is a copy into a pack, or the wait for one
                save.spans[UPLOAD].append(span)
            save.stored_bytes += event.n_bytes("stored_bytes")
        case "PackStored":
            save.marks.in_packs = True
            save.spans[UPLOAD].append(span)
            save.marks.last_put_s = max(save.marks.last_put_s, event.end_s)
        case "SaveFinished":
            save.stored_bytes = event.n_bytes("file_bytes")
            save.state = "written" if save.step is None else "uploaded"
            if event.seconds("durable_s"):
                save.spans[COMMIT].append(span_of(event, "durable_s"))
            if save.step is None and not save.marks.has_snapshot and event.thread_name == "MainThread":
                save.spans[STALL].append(span)  # fastckpt.save, called by the training thread
        case "DeltasUsed":
            save.against = {what: n for what in OUTCOMES if (n := event.n_bytes(f"raw_bytes_{what}"))}
            save.why_full = event.text("why_full")
        case "SaveFailed" | "SnapshotDropped":
            save.state, save.error = "failed", event.text("error")
        case "CheckpointDurable":
            save.state = "durable"
            save.stored_bytes = event.n_bytes("stored_bytes") or save.stored_bytes
            if save.marks.last_put_s:
                save.spans[COMMIT].append(Span(save.marks.last_put_s, event.end_s))
    save.start_s = min(save.start_s, span.start_s)


def to_json(recordings: Sequence[Recording], summary: Summary) -> dict[str, Any]:
    """The content of `--json`: seconds, bytes, and times since the epoch."""
    return {
        "processes": [
            {
                "name": recording.name,
                "pid": recording.pid,
                "rank": recording.rank,
                "versions": recording.versions,
                "utc": recording.utc,
                "events": len(recording.events),
            }
            for recording in recordings
        ],
        "saves": [_save_to_json(save) for save in summary.saves],
        "loads": [
            {
                "process": load.process,
                "source": load.source,
                "unix_s": load.start_s,
                "seconds": load.end_s - load.start_s,
                "raw_bytes": load.raw_bytes,
            }
            for load in summary.loads
        ],
        "other_stall_s": summary.other_stall_s,
        "deferred": summary.deferred,
        "notes": [note for recording in recordings for note in recording.notes],
    }


def _save_to_json(save: Save) -> dict[str, Any]:
    return {
        "process": save.process,
        "target": save.target,
        "step": save.step,
        "state": save.state,
        "error": save.error or None,
        "unix_s": save.start_s,
        "seconds": save.seconds,
        "raw_bytes": save.raw_bytes,
        "stored_bytes": save.stored_bytes,
        "against": save.against,
        "why_full": save.why_full or None,
        "stages": {
            stage: {"wall_s": save.wall_s(stage), "busy_s": save.busy_s(stage), "bytes_s": save.speed(stage)}
            for stage in STAGES
        },
        "bottleneck": save.bottleneck,
    }
