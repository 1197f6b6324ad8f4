"""Knobs are validated when built; events say what happened and can harm nothing."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt import events
from fastckpt import options as options_module
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


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("FASTCKPT_THREADS", "-1", "an integer ≥ 0"),
        ("FASTCKPT_THREADS", "2.5", "an integer ≥ 0"),
        ("FASTCKPT_HOST_BUDGET_BYTES", "-5", "an integer ≥ 0"),
        ("FASTCKPT_HOST_BUDGET_BYTES", "5", "0, for half of the memory, or more: one chunk in flight needs 16777216"),
        ("FASTCKPT_COMPRESS", "maybe", "one of 1, true, yes, y, 0, false, no, n"),
        ("FASTCKPT_MAX_STALL_S", "nan", "a number ≥ 0"),
        ("FASTCKPT_MAX_STALL_S", "soon", "a number ≥ 0"),
        ("FASTCKPT_VERIFY_SNAPSHOT", "on", '"sampled", "always", "first" or "off"'),
        ("FASTCKPT_CONNECTIONS", "-1", "an integer ≥ 0"),
        ("FASTCKPT_BACKGROUND_NICE", "20", "at most 19"),
    ],
)
def test_a_bad_variable_is_named(name: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=name) as caught:
        Options.from_env()
    assert str(caught.value) == f"{name} is {text!r}: expected {expected}"


def test_a_mistyped_variable_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(options_module, "_told_of_unknown", False)
    for name in ("FASTCKPT_COMPRES", "FASTCKPT_MAX_LOAD", "FASTCKPT_BUCKET", "FASTCKPT_TRACE", "FASTCKPT_URL"):
        monkeypatch.setenv(name, "")
    Options.from_env()
    Options.from_env()
    assert caplog.messages == [
        "FASTCKPT_COMPRES is not known; did you mean FASTCKPT_COMPRESS? "
        "FASTCKPT_MAX_LOAD is not known; did you mean FASTCKPT_MAX_LOAD_BYTES?"
    ]


def test_every_variable_that_is_read_is_known() -> None:
    root = Path(__file__).parents[2]
    read = set()
    sources = [
        p
        for folder in ("fastckpt", "tests", "examples", "benchmarks", "scripts")
        for p in (root / folder).rglob("*.py")
    ]
    for path in [root / "setup.py", *sources]:
        pattern = r"""(?:environ(?:\.get|\.setdefault)?[(\[]|is_set\(|ENV\w* = )["'](FASTCKPT_[A-Z0-9_]+)"""
        read.update(re.findall(pattern, path.read_text()))
    for path in (root / "csrc").glob("*.cpp"):
        read.update(re.findall(r'getenv\("(FASTCKPT_[A-Z0-9_]+)', path.read_text()))
    assert {"FASTCKPT_ISA", "FASTCKPT_KERNELS", "FASTCKPT_SANITIZE", "FASTCKPT_URL", "FASTCKPT_GPU_SEED"} <= read
    knobs = {options_module.variable(field.name) for field in dataclasses.fields(Options)}
    assert read - knobs <= options_module.OTHER_VARIABLES


def test_frozen_and_bounded() -> None:
    options = Options(threads=8, host_budget_bytes=96 << 20)
    assert options.chunks_in_flight * 4 * 8 << 20 == options.host_budget_bytes, "a quarter, where native kernels run"
    assert options.snapshot_bytes == options.host_budget_bytes - (24 << 20) - 9 * (4 << 20)
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
