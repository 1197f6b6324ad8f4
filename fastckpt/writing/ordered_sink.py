"""A sink that waits for its turn before it touches its target."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Hashable
from typing import Any

from fastckpt.host.files import AtomicFile
from fastckpt.host.held import descriptor_of
from fastckpt.host.sink import Sink
from fastckpt.writing.object_sink import ObjectSink
from fastckpt.writing.sinks import DirectFile, open_sink
from fastckpt.writing.turns import Turn


class OrderedSink:
    """Passes on to another sink. What replaces its target waits at the commit, all else before the first byte."""

    def __init__(self, sink: Sink, turn: Turn, timeout_s: float) -> None:
        """timeout_s: how long earlier saves to the target are waited for. The turn ends with the sink."""
        self._sink, self._turn, self._timeout_s = sink, turn, timeout_s
        self._has_come = False

    def wait(self) -> None:
        """Until it is this save's turn. TargetBusyError, OvertakenError."""
        if self._has_come:
            return
        waited = self._turn.wait(self._timeout_s)
        self._has_come = True
        if waited and isinstance(self._sink, DirectFile) and self._sink.empty:
            # It may hold an earlier save's bytes now, and is replaced then.
            self._sink.abandon()
            self._sink = open_sink(self._sink.absolute_path)

    def hand_over(self) -> None:
        """Another thread goes on with the save."""
        self._turn.hand_over()

    def expect(self, raw_bytes: int) -> None:
        """How large the state is, before the first byte."""
        if isinstance(self._sink, ObjectSink):
            self._sink.expect(raw_bytes)

    def write(self, data: Any) -> None:
        if not isinstance(self._sink, (AtomicFile, ObjectSink)):
            self.wait()
        self._sink.write(data)

    def commit(self) -> None:
        self.wait()
        self._sink.commit()
        self._turn.end()

    def abandon(self) -> None:
        self._sink.abandon()
        self._turn.end()


def keys_of_path(path: str) -> tuple[Hashable, ...]:
    """What the target of a path is known by: all names of one have a key in common (symbolic links, relative paths, bind mounts of its
    directory), and so has the same name in a directory that was moved away or removed and made again meanwhile.
    """
    if descriptor_of(path) is not None:
        return (_key_of_open_file(os.stat(path)),)
    directory, name = os.path.split(os.path.realpath(path))
    by_name = "path", directory, name
    try:
        found = os.stat(directory)
    except OSError:  # not there: the save says so
        return (by_name,)
    return by_name, ("path", found.st_dev, found.st_ino, name)


def keys_of_object(f: Any) -> tuple[Hashable, ...]:
    """What a file object is known by: itself, and the file that it writes to, which other objects and names of descriptors may share."""
    key = "object", id(f)
    with contextlib.suppress(Exception):  # whatever somebody's object answers: it is its own target then
        file = f if isinstance(f, io.IOBase) else f.file  # the wrapper of NamedTemporaryFile
        # Asked for its descriptor, this one would leave memory for a file.
        if isinstance(file, io.IOBase) and not isinstance(file, tempfile.SpooledTemporaryFile):
            return key, _key_of_open_file(os.fstat(file.fileno()))
    return (key,)


def _key_of_open_file(found: os.stat_result) -> Hashable:
    return "open file", found.st_dev, found.st_ino
