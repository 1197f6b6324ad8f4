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
    """Passes everything on to another sink, in its turn. A sink that replaces its target waits at the commit, any other sink before its
    first byte.
    """

    def __init__(self, sink: Sink, turn: Turn, timeout_s: float) -> None:
        """timeout_s: how long this save waits for earlier saves to the target. The turn ends with the sink."""
        self._sink, self._turn, self._timeout_s = sink, turn, timeout_s
        self._has_come = False

    def wait(self) -> None:
        """Wait until it is this save's turn. TargetBusyError, OvertakenError."""
        if self._has_come:
            return
        waited = self._turn.wait(self._timeout_s)
        self._has_come = True
        if waited and isinstance(self._sink, DirectFile) and self._sink.empty:
            # A file that was empty may hold an earlier save's bytes now; then it is replaced instead.
            self._sink.abandon()
            self._sink = open_sink(self._sink.absolute_path)

    def hand_over(self) -> None:
        """Another thread continues the save."""
        self._turn.hand_over()

    def expect(self, raw_bytes: int) -> None:
        """Tell the sink the size of the state, before the first byte."""
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
    """Keys that identify the target of a path. All names of one target share a key (symbolic links, relative paths, bind mounts of its
    directory); so does the same name in a directory that was moved away, or removed and made again, in between.
    """
    if descriptor_of(path) is not None:
        return (_key_of_open_file(os.stat(path)),)
    directory, name = os.path.split(os.path.realpath(path))
    by_name = "path", directory, name
    try:
        found = os.stat(directory)
    except OSError:  # it does not exist: the save itself will say so
        return (by_name,)
    return by_name, ("path", found.st_dev, found.st_ino, name)


def keys_of_object(f: Any) -> tuple[Hashable, ...]:
    """Keys that identify a file object: the object itself, and the file that it writes to, which other objects and descriptors may
    share.
    """
    key = "object", id(f)
    with contextlib.suppress(Exception):  # a user's object may raise anything: then it is identified by itself alone
        file = f if isinstance(f, io.IOBase) else f.file  # NamedTemporaryFile returns a wrapper
        # A SpooledTemporaryFile that is asked for its descriptor would move from memory to a file.
        if isinstance(file, io.IOBase) and not isinstance(file, tempfile.SpooledTemporaryFile):
            return key, _key_of_open_file(os.fstat(file.fileno()))
    return (key,)


def _key_of_open_file(found: os.stat_result) -> Hashable:
    return "open file", found.st_dev, found.st_ino
