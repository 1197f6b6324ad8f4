"""Maps events to the stages of a save; arithmetic on stretches of time. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastckpt.trace.parsing import Recorded

STALL, STAGE, ENCODE, UPLOAD, COMMIT = "stall", "stage", "encode", "upload", "commit"
STAGES = (STALL, STAGE, ENCODE, UPLOAD, COMMIT)


class Span(NamedTuple):
    """A stretch of time, in seconds since the epoch."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Its length, never negative."""
        return self.end_s - self.start_s


class Moment(NamedTuple):
    """The information of one event about a span."""

    name: str
    span: Span
    across: str
    """Name of a row for spans that may overlap others of the thread that emitted them, such as a copy that a device makes. "": the span
    belongs to the row of the emitting thread."""


_NAMES = {
    "PieceStaged": "copy piece",
    "ChunkEncoded": "encode chunk",
    "PackStored": "put pack",
    "ChunkLoaded": "load chunk",
    "SnapshotStaged": "snapshot",
    "CheckpointDurable": "until durable",
    "SaveFinished": "save",
    "LoadFinished": "load",
}


def moments(event: Recorded) -> list[Moment]:
    """The spans that ended with an event; none for an event that has none."""
    kind = event.kind
    if kind == "ChunkStored":
        return [Moment("write chunk", span_of(event, "write_s"), "")]
    if "seconds" not in event.data:
        return []
    span = span_of(event)
    name = f"stall: {event.text('why')}" if kind == "FenceWaited" else _NAMES.get(kind, kind)
    across = {"CheckpointDurable": "saves, call to durable", "SnapshotStaged": "snapshots"}.get(kind, "")
    if kind == "PieceStaged" and event.text("device") not in ("", "cpu"):
        across = f"copies from {event.text('device')}"
    raw = raw_span(event)
    before = [Moment("get raw bytes", raw, "")] if kind == "ChunkEncoded" and raw.seconds > 0 else []
    return [*before, Moment(name, span, across)]


def raw_span(event: Recorded) -> Span:
    """For ChunkEncoded: the time before its span, until the raw bytes were available."""
    start_s = span_of(event).start_s
    return Span(max(0.0, start_s - event.seconds("raw_s")), start_s)


def span_of(event: Recorded, field: str = "seconds") -> Span:
    """The span that ends with an event and is as long as one of its fields."""
    return Span(max(0.0, event.end_s - event.seconds(field)), event.end_s)


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as ordered stretches that do not touch."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start_s <= merged[-1].end_s:
            merged[-1] = Span(merged[-1].start_s, max(merged[-1].end_s, span.end_s))
        else:
            merged.append(span)
    return merged


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one span."""
    return sum(span.seconds for span in union(spans))


def lanes(spans: Sequence[Span]) -> list[int]:
    """Number the spans with as few lanes as possible, so that no two spans in one lane overlap. In the order given."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    chosen = [0] * len(spans)
    for number in sorted(range(len(spans)), key=lambda n: spans[n]):
        span = spans[number]
        while busy and busy[0][0] <= span.start_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (span.end_s, lane))
        chosen[number] = lane
    return chosen
