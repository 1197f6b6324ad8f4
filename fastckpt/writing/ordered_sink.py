"""A sink that waits for its turn before it touches its target."""

from __future__ import annotations

import os
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


def key_of_path(path: str) -> Hashable:
    """The same for all names of one target: symbolic links, relative paths, bind mounts of its directory."""
    if descriptor_of(path) is not None:
        found = os.stat(path)
        return "descriptor", found.st_dev, found.st_ino
    directory, name = os.path.split(os.path.realpath(path))
    try:
        found = os.stat(directory)
    except OSError:  # not there: the save says so
        return "path", directory, name
    return "path", found.st_dev, found.st_ino, name
