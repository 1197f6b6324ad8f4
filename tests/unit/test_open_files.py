"""Files of a load are opened once, and not all at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastckpt.reading import open_files
from fastckpt.reading.open_files import OpenFiles
from fastckpt.reading.sources import NoFile


class Counting(NoFile):
    """Counts how often it is opened, and what is open."""

    is_file = True
    name, n_bytes = "counting", 1

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"x")
        self._path = path
        self.counts: Counter[str] = Counter()

    @contextmanager
    def opened(self) -> Iterator[int]:
        file = os.open(self._path, os.O_RDONLY)
        self.counts.update(opened=1, now=1)
        try:
            yield file
        finally:
            os.close(file)
            self.counts["now"] -= 1

    def read_into(self, offset: int, out: object) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing."""


def test_a_file_is_opened_once_and_closed_at_the_end(tmp_path: Path) -> None:
    source = Counting(tmp_path / "a")
    files = OpenFiles([source])
    for _ in range(3):
        with files.opened(0) as file:
            assert os.pread(file, 1, 0) == b"x"
    assert source.counts == {"opened": 1, "now": 1}
    files.close()
    assert source.counts == {"opened": 1, "now": 0}


def test_no_more_than_a_few_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST_KEPT", 2)
    sources = [Counting(tmp_path / str(n)) for n in range(5)]
    files = OpenFiles(sources)
    for number in [*range(5), *range(5)]:
        with files.opened(number) as file:
            assert os.pread(file, 1, 0) == b"x"
    assert [source.counts["now"] for source in sources] == [1, 1, 0, 0, 0]
    assert [source.counts["opened"] for source in sources] == [1, 1, 2, 2, 2]
    files.close()
    assert not any(source.counts["now"] for source in sources)


def test_a_file_that_cannot_be_opened_is_asked_for_again(tmp_path: Path) -> None:
    source = Counting(tmp_path / "a")
    (tmp_path / "a").unlink()
    files = OpenFiles([source])
    with pytest.raises(FileNotFoundError), files.opened(0):
        pass
    (tmp_path / "a").write_bytes(b"y")
    with files.opened(0) as file:
        assert os.pread(file, 1, 0) == b"y"
    files.close()
