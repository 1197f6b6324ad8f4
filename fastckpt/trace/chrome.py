"""Recordings → Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open. Pure.

Each recording is a process. Its rows are saves and snapshots (spans that begin on one thread and end on another), then its threads. Threads
of the same name that lived one after the other share a row; otherwise each save would add rows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastckpt.trace.parsing import Recorded, Recording
from fastckpt.trace.stages import Moment, Span, lanes, moments

_ACROSS_ROW = 1_000_000  # numbers of rows that are not threads
_COUNTER_US = 1000.0  # a counter needs no finer steps; chunks may come faster
_COUNTED = {
    "PieceStaged": ("staged", "raw_bytes"),
    "ChunkEncoded": ("encoded", "raw_bytes"),
    "PackStored": ("uploaded", "stored_bytes"),
    "ChunkStored": ("stored", "stored_bytes"),
}
_ROW_ORDER = ("MainThread", "fastckpt-stage", "fastckpt-save", "fastckpt-upload", "fastckpt-")

ChromeEvent = dict[str, Any]
_Found = tuple[Recorded, list[Moment]]


def to_chrome(recordings: Sequence[Recording]) -> Iterator[ChromeEvent]:
    """The members of `traceEvents`: metadata first, then by time. Times are µs from the first span on, never negative."""
    found = [[(event, moments(event)) for event in recording.events] for recording in recordings]
    starts = (_start_s(event, spans) for one in found for event, spans in one)
    zero_s = min(starts, default=0.0)
    pids = [recording.pid for recording in recordings]
    if (
        len(set(pids)) < len(pids) or max(pids, default=0) >= 1 << 31
    ):  # recordings of several machines may use the same process ids
        pids = list(range(1, len(pids) + 1))
    body: list[ChromeEvent] = []
    for recording, pid, one in zip(recordings, pids, found, strict=True):
        rows = _Rows(one)
        yield from _names(recording, pid, rows)
        body += _spans(one, pid, rows, zero_s)
        body += _counters(recording.events, pid, zero_s)
    # Enclosing spans first: if starts are equal, viewers nest by order.
    yield from sorted(body, key=lambda event: (event["ts"], -event.get("dur", 0.0)))


def _start_s(event: Recorded, spans: Sequence[Moment]) -> float:
    return min((one.span.start_s for one in spans), default=event.end_s)


class _Rows:
    """Chooses the row (tid) of a span."""

    def __init__(self, found: Sequence[_Found]) -> None:
        self.names: dict[int, str] = {}
        lives: dict[tuple[str, int], Span] = {}
        across: dict[str, list[Moment]] = defaultdict(list)
        for event, spans in found:
            for one in spans:
                if one.across:
                    across[one.across].append(one)
            if any(one.across for one in spans):
                continue
            span = Span(_start_s(event, spans), event.end_s)
            key = event.thread_name, event.thread
            known = lives.get(key, span)
            lives[key] = Span(min(known.start_s, span.start_s), max(known.end_s, span.end_s))
        self._of_thread: dict[tuple[str, int], int] = {}
        by_name: dict[str, list[int]] = defaultdict(list)
        for name, thread in lives:
            by_name[name].append(thread)
        for name in sorted(by_name, key=_row_order):
            threads = by_name[name]
            first = len(self.names) + 1
            for thread, lane in zip(threads, lanes([lives[name, thread] for thread in threads]), strict=True):
                self._of_thread[name, thread] = first + lane
                self.names[first + lane] = name
        self._of_across: dict[int, int] = {}
        for name, members in across.items():
            first = _ACROSS_ROW + len(self.names)
            for one, lane in zip(members, lanes([one.span for one in members]), strict=True):
                self._of_across[id(one)] = first + lane
                self.names[first + lane] = name

    def of(self, event: Recorded, one: Moment | None = None) -> int:
        row = None if one is None else self._of_across.get(id(one))
        return self._of_thread[event.thread_name, event.thread] if row is None else row


def _row_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Sort rows down the pipeline; numbers in names sort as numbers."""
    place = next((n for n, start in enumerate(_ROW_ORDER) if name.startswith(start)), len(_ROW_ORDER))
    parts = re.split(r"(\d{1,9})", name)
    return place, [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]


def _names(recording: Recording, pid: int, rows: _Rows) -> Iterator[ChromeEvent]:
    def metadata(name: str, tid: int, args: Mapping[str, Any]) -> ChromeEvent:
        return {"ph": "M", "ts": 0, "pid": pid, "tid": tid, "name": name, "args": dict(args)}

    yield metadata("process_name", 0, {"name": recording.label})
    yield metadata("process_labels", 0, {"labels": recording.versions})
    for row, name in rows.names.items():
        yield metadata("thread_name", row, {"name": name})
        yield metadata(
            "thread_sort_index", row, {"sort_index": row % _ACROSS_ROW - (10**6 if row >= _ACROSS_ROW else 0)}
        )


def _spans(found: Sequence[_Found], pid: int, rows: _Rows, zero_s: float) -> Iterator[ChromeEvent]:
    for event, spans in found:
        common = {"cat": event.kind, "pid": pid, "args": dict(event.data)}
        if not spans:
            yield {
                "ph": "i",
                "s": "t",
                "name": event.kind,
                "ts": _us(event.end_s, zero_s),
                "tid": rows.of(event),
                **common,
            }
        for one in spans:
            start = _us(one.span.start_s, zero_s)
            duration = max(0.0, round(_us(one.span.end_s, zero_s) - start, 3))
            yield {"ph": "X", "name": one.name, "ts": start, "dur": duration, "tid": rows.of(event, one), **common}


def _counters(events: Sequence[Recorded], pid: int, zero_s: float) -> Iterator[ChromeEvent]:
    """Total bytes of each stage over time: at most one value a millisecond, and the last one."""
    totals: dict[str, int] = {}
    shown: dict[str, float] = {}
    pending: dict[str, ChromeEvent] = {}
    for event in events:
        series, field = _COUNTED.get(event.kind, ("", ""))
        if not series:
            continue
        totals[series] = totals.get(series, 0) + event.n_bytes(field)
        ts = _us(event.end_s, zero_s)
        counter = {
            "ph": "C",
            "ts": ts,
            "pid": pid,
            "tid": 0,
            "name": f"bytes {series}",
            "args": {"bytes": totals[series]},
        }
        if series in shown and ts - shown[series] < _COUNTER_US:
            pending[series] = counter
            continue
        pending.pop(series, None)
        shown[series] = ts
        yield counter
    yield from pending.values()


def _us(time_s: float, zero_s: float) -> float:
    return max(0.0, round((time_s - zero_s) * 1e6, 3))
