"""Knobs are validated when built; events say what happened and can harm nothing."""

from __future__ import annotations

import dataclasses
import io
import logging

import pytest
import torch

import fastckpt
from fastckpt import events
from fastckpt.options import CHUNK_IN_FLIGHT_BYTES, Options


def test_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match=r"threads is -1.*compress is 3"):
        Options(threads=-1, compress=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one chunk in flight needs"):
        Options(host_budget_bytes=1)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_THREADS", "3")
    monkeypatch.setenv("FASTCKPT_COMPRESS", "no")
    assert (Options.from_env().threads, Options.from_env().compress) == (3, False)
    monkeypatch.setenv("FASTCKPT_THREADS", "many")
    monkeypatch.setenv("FASTCKPT_COMPRESS", "perhaps")
    with pytest.raises(ValueError, match=r"FASTCKPT_THREADS is 'many'.*FASTCKPT_COMPRESS is 'perhaps'"):
        Options.from_env()


def test_frozen_and_bounded() -> None:
    options = Options(threads=8, host_budget_bytes=96 << 20)
    assert options.chunks_in_flight * 4 * 8 << 20 == options.host_budget_bytes, "a quarter, where native kernels run"
    assert options.snapshot_bytes == options.host_budget_bytes - (24 << 20) - 9 * options.max_pack_bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.threads = 1  # type: ignore[misc]


def test_events_of_a_save_and_a_load() -> None:
    seen: list[events.Event] = []
    buffer = io.BytesIO()
    state = {"a": torch.randn(3_000_000), "b": torch.ones(10)}
    with events.subscribe(seen.append):
        fastckpt.save(state, buffer)
        buffer.seek(0)
        fastckpt.load(buffer)
    kinds = [type(event).__name__ for event in seen]
    assert kinds[0] == "SaveStarted"
    assert kinds.index("SaveFinished") < kinds.index("LoadStarted")
    assert kinds[-1] == "LoadFinished"
    stored = [event for event in seen if isinstance(event, events.ChunkStored)]
    assert [event.record for event in stored] == list(range(len(stored)))
    assert sum(event.raw_bytes for event in stored) == 12_000_040
    (finished,) = (event for event in seen if isinstance(event, events.SaveFinished))
    assert finished.file_bytes == len(buffer.getvalue())
    assert sum(isinstance(event, events.ChunkLoaded) for event in seen) == len(stored)
    count = len(seen)
    fastckpt.save(state, io.BytesIO())
    assert len(seen) == count, "the subscription has ended"


def test_a_failing_subscriber_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: events.Event) -> None:
        raise RuntimeError("a broken progress bar")

    buffer = io.BytesIO()
    with events.subscribe(fail), caplog.at_level(logging.ERROR, "fastckpt"):
        fastckpt.save({"a": torch.arange(3)}, buffer)
    buffer.seek(0)
    assert torch.equal(fastckpt.load(buffer)["a"], torch.arange(3))
    assert "a broken progress bar" in caplog.text


def test_a_failed_save_is_an_event(tmp_path: object) -> None:
    class Broken(io.BytesIO):
        def write(self, data: object, /) -> int:
            raise OSError(28, "No space left on device")

    seen: list[events.Event] = []
    with events.subscribe(seen.append), pytest.raises(OSError, match="No space left"):
        fastckpt.save({"a": torch.arange(3)}, Broken())
    assert isinstance(seen[-1], events.SaveFailed)


def test_async_save_that_does_not_fit_is_written_first(tmp_path: object, caplog: pytest.LogCaptureFixture) -> None:
    buffer = io.BytesIO()
    options = Options(threads=1, host_budget_bytes=CHUNK_IN_FLIGHT_BYTES)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        handle = fastckpt.save_async({"a": torch.randn(6_000_000)}, buffer, options=options)
    assert handle.done()
    assert handle.staged.done()
    assert handle.wait() == len(buffer.getvalue())
    assert "does not fit the budget" in caplog.text


def test_async_save_keeps_the_state_of_the_call() -> None:
    buffer = io.BytesIO()
    tensor = torch.arange(2_000_000, dtype=torch.float32)
    expected = tensor.clone()
    handle = fastckpt.save_async({"a": tensor}, buffer)
    tensor.zero_()
    handle.wait()
    buffer.seek(0)
    assert torch.equal(fastckpt.load(buffer)["a"], expected)


def test_async_failure_reaches_handle_and_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(io.BytesIO):
        def write(self, data: object, /) -> int:
            raise OSError(5, "Input/output error")

    with caplog.at_level(logging.ERROR, "fastckpt"):
        handle = fastckpt.save_async({"a": torch.arange(3)}, Broken())
        with pytest.raises(OSError, match="Input/output"):
            handle.wait()
    assert "in the background failed" in caplog.text


def test_no_more_connections_than_a_store_can_use() -> None:
    options = Options(connections=8)
    assert options.for_store(2).connections == 2
    assert options.for_store(None) is options
    assert options.for_store(20) is options
    with pytest.raises(ValueError, match="background_nice is 20: it must be at most 19"):
        Options(background_nice=20)
