"""File objects that raise, take half or answer nonsense."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import fastckpt
from tests.crash import tools

NEW = 2


class Writer:
    """A file object whose write answers what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.data = answer, bytearray()

    def write(self, data: bytes) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        taken = data[:100] if self.answer == "short" else data
        self.data += taken
        return len(taken) if self.answer in ("short", "all") else self.answer

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("answer", ["all", "short", None])
def test_file_object_takes_it_all(tmp_path: Path, answer: Any) -> None:
    writer = Writer(answer)
    fastckpt.save(tools.state(NEW), writer)
    (tmp_path / "a").write_bytes(writer.data)
    assert tools.loaded(tmp_path / "a") == NEW


@pytest.mark.parametrize("answer", [0, -1, 1 << 40, "ten", 2.5, b""], ids=repr)
def test_file_object_answers_nonsense(answer: Any) -> None:
    with pytest.raises(fastckpt.SaveError, match=r"Writer\.write returned"):
        fastckpt.save(tools.state(NEW), Writer(answer))


def test_file_object_raises() -> None:
    error = OSError(errno.EPIPE, "nobody listens")
    with pytest.raises(BrokenPipeError) as caught:
        fastckpt.save(tools.state(NEW), Writer(error))
    assert caught.value is error
