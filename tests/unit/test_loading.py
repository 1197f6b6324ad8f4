"""How a load goes about it: what pages it asks for, and when it reads ahead."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import NoCheckpointError
from fastckpt.format import keys
from fastckpt.host import pages
from fastckpt.kernels import kernels
from fastckpt.kernels.chunk_table import table_of
from fastckpt.reading import range_chunks, sources
from fastckpt.reading.sources import PathSource
from fastckpt.reading.workers import WAITING_THREADS


@pytest.fixture
def reporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the kernel says of free page reporting; None: nothing."""

    def say(words: str | None) -> bool:
        file = tmp_path / "page_reporting_order"
        if words is not None:
            file.write_text(words)
        monkeypatch.setattr(pages, "_REPORTING", file)
        pages.huge_pages_pay.cache_clear()
        return pages.huge_pages_pay()

    yield say
    pages.huge_pages_pay.cache_clear()


@pytest.mark.parametrize(
    ("words", "pay"),
    [(None, True), ("-1\n", True), ("4294967295\n", True), ("?", True), ("9\n", False), ("0\n", False)],
)
def test_huge_pages_are_asked_for_unless_the_host_takes_free_ones_back(
    reporting: Any, words: str | None, pay: bool
) -> None:
    assert reporting(words) is pay
    room = pages.fresh_pages(8 << 20)
    room[:] = 1
    assert ("hg" in _flags_of(room.ctypes.data)) is pay


def _flags_of(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.fixture
def file(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    state = {f"w{n}": torch.randn(700_000, generator=torch.Generator().manual_seed(n)) for n in range(8)}
    path = str(tmp_path / "a.fckpt")
    fastckpt.save(state, path)
    return path, state


@pytest.mark.parametrize("read", [fastckpt.load, fastckpt.open, fastckpt.get_unsafe_globals])
def test_a_directory_is_told_what_to_do_with(read: Callable[[str], object], tmp_path: Path) -> None:
    assert sources.MARKER == keys.MARKER
    with pytest.raises(IsADirectoryError, match="Is a directory, where the file of a checkpoint is expected") as caught:
        read(str(tmp_path))
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, str(tmp_path))
    (tmp_path / sources.MARKER).touch()
    if read is fastckpt.get_unsafe_globals:
        with pytest.raises(IsADirectoryError, match=r"Checkpointer\(…\)\.restore\(\).*`fastckpt restore`"):
            read(str(tmp_path))
        return
    with pytest.raises(NoCheckpointError, match="has no checkpoint yet"):
        read(str(tmp_path))


@pytest.mark.parametrize("missing", [False, True])
def test_a_file_is_waited_for_if_some_of_it_is_not_in_the_page_cache(
    file: tuple[str, Any], missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PathSource(file[0])
    probed: list[int] = []

    def preadv(_: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        probed.append(offset)
        assert flags == os.RWF_NOWAIT
        if missing and offset > source.n_bytes // 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return len(buffers[0])

    with monkeypatch.context() as patched:
        patched.setattr("os.preadv", preadv)
        assert bool(source.reads_at_once()) is missing
    assert probed[0] == 0
    assert max(probed) < source.n_bytes
    source.close()


@pytest.mark.parametrize("waits", [False, True])
def test_a_disk_is_told_ahead_and_waited_for_by_a_few_threads_more(
    file: tuple[str, Any], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = file
    lock, now, most, told = threading.Lock(), 0, 0, []
    load = kernels().read_chunks
    assert load is not None

    def counting_load(*args: Any) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)  # so that as many as may come together do
        try:
            load(*args)
        finally:
            with lock:
                now -= 1

    counting = kernels()._replace(read_chunks=counting_load)
    monkeypatch.setattr("fastckpt.reading.range_chunks.kernels", lambda: counting)
    monkeypatch.setattr("os.posix_fadvise", lambda fd, offset, n, advice: told.append((offset, n)))
    monkeypatch.setattr(PathSource, "reads_at_once", lambda self: sources.COLD_READS if waits else 0)
    monkeypatch.setenv("FASTCKPT_THREADS", "2")
    loaded = fastckpt.load(path)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert most <= 2 + waits * WAITING_THREADS
    assert bool(told) is waits
    assert len(told) == len(set(told)), "the system was told twice"


def test_a_thread_finds_foreign_frames_while_others_read(
    file: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a thread's look at the native kernel and its call of it, another one has given it up."""
    path, state = file
    readers: list[Any] = []
    own = range_chunks.RangeChunks.__init__

    def init(self: Any, *args: Any) -> None:
        own(self, *args)
        readers.append(self)

    def table(*args: Any) -> Any:
        readers[-1]._native = None
        return table_of(*args)

    monkeypatch.setattr(range_chunks.RangeChunks, "__init__", init)
    monkeypatch.setattr(range_chunks, "table_of", table)
    loaded = fastckpt.load(path)
    assert readers
    assert readers[-1]._native is None
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_arguments_that_play_no_part_are_told_at_the_line_of_the_call(tmp_path: Path) -> None:
    fastckpt.save({"a": torch.zeros(3)}, tmp_path / "x.fckpt")
    with fastckpt.Checkpointer(tmp_path / "run", {"a": {"w": torch.zeros(3)}}, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    for path in (tmp_path / "x.fckpt", tmp_path / "run"):
        with pytest.warns(UserWarning, match="only works if `weights_only=False`") as told:
            fastckpt.load(path, encoding="latin1")
        assert [warning.filename for warning in told] == [__file__]
