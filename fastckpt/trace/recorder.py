"""Records events: one JSON object a line, written by a thread of its own that never delays training (docs/cli.md, trace).

    emit ─→ (time, thread, event) ─→ bounded queue ─→ one daemon thread: JSON ─→ append to the file

The first line says who wrote it and ties the monotonic clock to UTC; each other line is an event: `event` (its class), `t` (seconds of
time.perf_counter() when it was emitted), `tid` and `thread` (where), `data` (its fields). Knows nothing of particular events.

The file is a log, not a checkpoint: it is never synced, and a killed process may leave its last line cut.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from fastckpt._version import __version__
from fastckpt.host.threads import forget_when_over, start, when_over

logger = logging.getLogger("fastckpt")

VERSION = 1
"""Version of the format, in the first line as `fastckpt_recording`."""
MAX_RECORDING_BYTES = 128 << 20
"""Recording stops before the file gets longer, and readers refuse longer files. Enough for some 200 000 chunks, 800 GB of state."""
MAX_LINE_BYTES = 64 << 10
MAX_TEXT = 500
"""Number of characters that are kept of a text in an event."""
_MAX_FIELDS = 50

_MAX_WAITING = 1 << 16  # events between emit and the file: some 50 MB at worst, seconds of the fastest save
_GATHER_S = 0.05  # events of this time are written in one go; a longer time would lose more with a killed process
_CLOSE_S = 10.0  # a file system that hangs must not keep the interpreter alive
_MAX_NAMES = 1000

_Item = tuple[float, int, str, object]


class Recorder:
    """A subscriber that writes events to a new file. Calling it takes about a microsecond, from any thread, and never blocks.

    path: `{pid}` and `{rank}` ($RANK, or 0) are replaced. If the file exists, it is left alone and `-1`, `-2` … before the suffix make the
    name a new one. OSError if no file can be made there. A later error stops the recording, with one warning.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._fd = _create(_filled(os.fspath(path)))
        self.dropped = 0
        """Number of events lost because the file was slower than training."""
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._stopped = False
        self._closing = threading.Event()
        self._written = 0
        self._pid = os.getpid()
        self._lock = threading.RLock()
        # A daemon, unlike the threads of saves: it lives as long as the recording and would keep the interpreter alive. Threads of
        # saves have been joined when `close` is called at the interpreter's end, so that nothing is missing.
        self._thread = threading.Thread(target=self._work, name="fastckpt-recorder", daemon=True)
        try:
            self._inline = not start(self._thread)
        except BaseException:
            os.close(self._fd)
            raise
        if self._inline:  # the interpreter is ending: the emitting thread also writes
            self._write_now(_first_line)
        else:
            when_over(self.close)

    def __call__(self, event: object) -> None:
        """Take an event, with the time of the call."""
        if self._stopped:
            return
        if self._queue.qsize() >= _MAX_WAITING:
            self.dropped += 1
            return
        item = (time.perf_counter(), threading.get_ident(), threading.current_thread().name, event)
        if self._inline:
            self._write_now(lambda: _line(item))
        else:
            self._queue.put(item)

    def close(self) -> None:
        """Write what was taken and close the file. Takes at most ten seconds. May be called twice, from any thread but the recorder's."""
        forget_when_over(self.close)
        if os.getpid() != self._pid:  # in a forked child the thread and the file belong to the parent
            return
        self._stopped = True
        if self._inline:
            with self._lock:
                self._close_file()
            return
        self._queue.put(None)
        self._closing.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the recording %s does not take what is written: its end is missing", self.path)

    def forget(self) -> None:
        """For a forked child, because the recording belongs to the parent: writes nothing, closes only the child's descriptor."""
        self._stopped = True
        forget_when_over(self.close)
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write_now(self, line: Callable[[], bytes]) -> None:
        with self._lock:
            if self._stopped:
                return
            try:
                self._write([line()])
            except Exception as error:
                self._stopped = True
                self._warn_stopped(error)
                self._close_file()

    def _warn_stopped(self, error: BaseException) -> None:
        logger.warning("recording events to %s has stopped: %s: %s", self.path, type(error).__name__, error)

    def _work(self) -> None:
        try:
            self._write([_first_line()])
            ended = False
            while not ended:
                batch = [self._queue.get()]
                self._closing.wait(_GATHER_S)
                batch += [self._queue.get() for _ in range(self._queue.qsize())]
                ended = None in batch
                self._write([_line(item) for item in batch if item is not None])
            if self.dropped:
                self._write([_line((time.perf_counter(), 0, "", _Dropped(self.dropped)))])
                logger.warning("%d events are missing from the recording %s", self.dropped, self.path)
        except BaseException as error:
            self._warn_stopped(error)
        finally:
            self._stopped = True
            while self._queue.qsize():  # events may hold errors, and errors frames
                self._queue.get()
            self._close_file()

    def _write(self, lines: list[bytes]) -> None:
        data = memoryview(b"".join(lines))
        if self._written + data.nbytes > MAX_RECORDING_BYTES:
            raise OSError(f"it would be longer than {MAX_RECORDING_BYTES} bytes")
        self._written += data.nbytes
        while data.nbytes:
            data = data[os.write(self._fd, data) :]


@dataclasses.dataclass
class _Dropped:
    """The recorder's own event: the number of missing events."""

    events: int


def _filled(path: str) -> str:
    # Not str.format: other braces belong to the path.
    return path.replace("{pid}", str(os.getpid())).replace("{rank}", str(rank() or 0))


def rank() -> int | None:
    """This process's $RANK, as launchers set it; None without one."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _create(path: str) -> tuple[str, int]:
    """Create a file that did not exist: never writes to the recording of another process, or to an earlier one."""
    stem, suffix = os.path.splitext(path)
    for number in range(_MAX_NAMES):
        name = path if not number else f"{stem}-{number}{suffix}"
        try:
            return name, os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
    raise FileExistsError(f"{path} and {_MAX_NAMES - 1} names after it exist already: remove old recordings")


def _first_line() -> bytes:
    torch: Any = sys.modules.get("torch")
    now, origin_s = time.time(), time.perf_counter()
    value = {
        "fastckpt_recording": VERSION,
        "pid": os.getpid(),
        "rank": rank(),
        "fastckpt": __version__,
        "torch": None if torch is None else str(torch.__version__),
        "python": platform.python_version(),
        "utc": datetime.fromtimestamp(now, timezone.utc).isoformat(),
        "unix_s": now,
        "origin_s": origin_s,
    }
    return json.dumps(value).encode() + b"\n"


def _line(item: _Item) -> bytes:
    end_s, thread, name, event = item
    data: dict[str, Any] = {}
    for field in dataclasses.fields(event)[:_MAX_FIELDS]:  # type: ignore[arg-type]
        value = getattr(event, field.name)
        if (
            isinstance(value, dict) and len(data) + len(value) <= _MAX_FIELDS
        ):  # a table: a field for each of its entries
            data |= {f"{field.name}_{str(key)[:MAX_TEXT]}": _plain(one) for key, one in value.items()}
        else:
            data[field.name] = _plain(value)
    kind = type(event).__name__.lstrip("_")
    data = dict(list(data.items())[:_MAX_FIELDS])
    line = {"event": kind, "t": round(end_s, 9), "tid": thread, "thread": name[:MAX_TEXT], "data": data}
    return json.dumps(line).encode() + b"\n"


def _plain(value: object) -> Any:
    """Convert a value to one that JSON can hold. No value in an event may end the recording."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return round(value, 9) if math.isfinite(value) else None
    try:
        text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text[:MAX_TEXT]


def open_recorder(path: str | None) -> Recorder | None:
    """The recorder that FASTCKPT_TRACE asks for. None: it asks for none, or none can be made, which is logged."""
    if not path:
        return None
    try:
        return Recorder(os.path.expanduser(path))
    except Exception as error:  # a failing recorder is no reason to fail
        logger.warning("FASTCKPT_TRACE: events are not recorded: %s: %s", type(error).__name__, error)
        return None
