"""Reads a recording from a file. The file may come from a stranger: everything is bounded and checked here, and no later module checks
again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, NoReturn

from fastckpt.errors import CheckpointError
from fastckpt.trace.recorder import MAX_LINE_BYTES, MAX_RECORDING_BYTES, MAX_TEXT, VERSION

MAX_EVENTS = 1_000_000
MAX_SECONDS = 1e8
"""Longest time that is accepted, for clocks and spans: three years."""
MAX_BYTES = 1 << 60
_MAX_THREADS = 10_000
_MAX_FIELDS = 50
_MAX_UNIX_S = 1e11


class RecordingError(CheckpointError):
    """The file is not a recording of events, is damaged, or has another version."""


class Recorded(NamedTuple):
    """One event. Numbers are finite and not negative, texts short."""

    kind: str
    """Name of the class of `fastckpt.events`."""
    end_s: float
    """The moment at which it was emitted: seconds since the epoch (UTC), by the monotonic clock of its process."""
    thread: int
    thread_name: str
    data: Mapping[str, Any]
    """Its fields: text, bool, None, float, or int from 0 to 2**60."""

    def n_bytes(self, name: str) -> int:
        """A field that counts; 0 if it is not there."""
        value = self.data.get(name)
        return value if type(value) is int else 0

    def seconds(self, name: str = "seconds") -> float:
        """A field that is a time; 0.0 if it is not there."""
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return 0.0
        return min(float(value), MAX_SECONDS)

    def text(self, name: str) -> str:
        """A field that is text; "" if it is not there."""
        value = self.data.get(name)
        return value if isinstance(value, str) else ""

    def step(self) -> int | None:
        """The field `step`."""
        value = self.data.get("step")
        return value if type(value) is int else None


@dataclass(frozen=True)
class Recording:
    """One process's events, in the order of their times."""

    name: str
    pid: int
    rank: int | None
    versions: str
    """The versions that wrote it: "fastckpt 0.1.0, torch 2.6.0, Python 3.11.7"."""
    utc: str
    events: list[Recorded]
    notes: list[str]
    """Sentences about missing events."""

    @property
    def label(self) -> str:
        """A label for the process."""
        who = f"pid {self.pid}" if self.rank is None else f"rank {self.rank}, pid {self.pid}"
        return f"{who} ({self.name})"


def read(path: str | os.PathLike[str]) -> Recording:
    """A recording by its path. RecordingError names the line; an incomplete last line is left out, with a note. OSError."""
    with open(path, "rb") as file:
        return parse(file, os.path.basename(os.fspath(path)))


def parse(file: BinaryIO, name: str) -> Recording:
    """As `read`, from an open file. name: for messages and labels."""
    notes: list[str] = []
    lines = _lines(file, name, notes)
    header = next(lines, None)
    if header is None:
        raise RecordingError(f"{name} is no recording of fastckpt's events: it is empty")
    origin_s, unix_s, recording = _header(header[1], name, notes)
    threads: set[tuple[int, str]] = set()
    for number, value in lines:
        event = _event(value, unix_s - origin_s, name, number)
        threads.add(event[2:4])
        if len(recording.events) >= MAX_EVENTS or len(threads) > _MAX_THREADS:
            raise RecordingError(
                f"{name}, line {number}: more than {MAX_EVENTS} events or {_MAX_THREADS} threads: no recording of ours"
            )
        if event.kind == "Dropped":
            notes.append(f"{name}: {event.n_bytes('events')} events are missing: the disk was slower than the events")
        else:
            recording.events.append(event)
    recording.events.sort(key=lambda event: event.end_s)
    return recording


def _lines(file: BinaryIO, name: str, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line."""
    number = total = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        total += len(line)
        if len(line) > MAX_LINE_BYTES or total > MAX_RECORDING_BYTES:
            what = "the line" if len(line) > MAX_LINE_BYTES else "the file"
            limit = MAX_LINE_BYTES if len(line) > MAX_LINE_BYTES else MAX_RECORDING_BYTES
            _fail(name, number, f"{what} is longer than {limit} bytes")
        if not line.endswith(b"\n") and number > 1:
            notes.append(f"{name}: the last line was cut and is left out: the process was killed or is still writing")
            return
        try:
            value = json.loads(line.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            _fail(name, number, f"it is no JSON: {error}")
        if not isinstance(value, dict):
            _fail(name, number, "it is no JSON object")
        yield number, value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _fail(name: str, number: int, why: str) -> NoReturn:
    what = "is no recording of fastckpt's events" if number == 1 else f"is damaged at line {number}"
    raise RecordingError(f"{name} {what}: {why}")


def _header(value: dict[str, Any], name: str, notes: list[str]) -> tuple[float, float, Recording]:
    version = value.get("fastckpt_recording")
    if version is None:
        _fail(name, 1, 'its first line does not say "fastckpt_recording"')
    if type(version) is not int or version != VERSION:
        raise RecordingError(
            f"{name} is a recording of version {str(version)[:20]}; this fastckpt reads version {VERSION}. Upgrade, or record again"
        )
    origin_s, unix_s = (_number(value.get(key)) for key in ("origin_s", "unix_s"))
    if origin_s is None or unix_s is None or origin_s > MAX_SECONDS or unix_s > _MAX_UNIX_S:
        _fail(name, 1, "origin_s or unix_s is no time")
    versions = (("fastckpt", "fastckpt"), ("torch", "torch"), ("python", "Python"))
    wrote = ", ".join(f"{shown} {_short(value.get(key))}" for key, shown in versions if value.get(key))
    rank = _count(value.get("rank"))
    return (
        origin_s,
        unix_s,
        Recording(name, _count(value.get("pid")) or 0, rank, wrote, _short(value.get("utc")), [], notes),
    )


def _event(value: dict[str, Any], offset_s: float, name: str, number: int) -> Recorded:
    kind, thread_name, data = value.get("event"), value.get("thread"), value.get("data")
    end_s, thread = _number(value.get("t")), _count(value.get("tid"))
    if not isinstance(kind, str) or not isinstance(thread_name, str) or not isinstance(data, dict):
        _fail(name, number, "it has no event, thread or data")
    if end_s is None or end_s > MAX_SECONDS or thread is None:
        _fail(name, number, "t or tid is no number, or out of range")
    if len(data) > _MAX_FIELDS:
        _fail(name, number, f"it has more than {_MAX_FIELDS} fields")
    # At least 0: an origin before the epoch can only be a wrong recording.
    return Recorded(
        _short(kind),
        max(0.0, end_s + offset_s),
        thread,
        _short(thread_name),
        {_short(key): _field(field, name, number, key) for key, field in data.items()},
    )


def _field(value: Any, name: str, number: int, key: str) -> Any:
    if isinstance(value, str):
        return _short(value)
    if value is None or isinstance(value, bool):
        return value
    if type(value) in (int, float):
        if not -MAX_BYTES <= value <= MAX_BYTES:  # also refuses NaN
            _fail(name, number, f"{_short(key)} is out of range")
        return max(value, 0)  # a negative value (of seconds_left) means that the time is over
    return None  # a list or an object, written by a newer fastckpt


def _number(value: Any) -> float | None:
    """A finite number that is not negative."""
    if type(value) is float and math.isfinite(value) and value >= 0:
        return value
    count = _count(value)
    return None if count is None else float(count)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 64 else None


def _short(value: Any) -> str:
    """A text that any encoder accepts, and that is not long."""
    return str(value)[:MAX_TEXT].encode("utf-8", "replace").decode()
