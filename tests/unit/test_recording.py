"""Recording events: complete, cheap, and harmless whatever happens to the file."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import events
from fastckpt.trace import read
from fastckpt.trace import recorder as recording
from fastckpt.trace.recorder import Recorder


def lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def deferred(step: int) -> events.SaveDeferred:
    return events.SaveDeferred(target="t", step=step, waiting=1)


def test_the_first_line_says_who_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    before = time.time()
    with events.record(tmp_path / "run.jsonl") as recorder:
        pass
    assert recorder.path == str(tmp_path / "run.jsonl")
    (first,) = lines(recorder.path)
    assert (first["fastckpt_recording"], first["pid"], first["rank"]) == (1, os.getpid(), 3)
    assert (first["fastckpt"], first["torch"]) == (fastckpt.__version__, str(torch.__version__))
    assert before <= first["unix_s"] <= time.time()
    assert first["origin_s"] <= time.perf_counter()
    assert first["utc"].endswith("+00:00")


def test_events_of_a_container(tmp_path: Path) -> None:
    state = {"a": torch.randn(3_000_000), "b": torch.ones(10)}
    with events.record(tmp_path / "run.jsonl"):
        fastckpt.save(state, tmp_path / "x.fckpt")
        fastckpt.load(tmp_path / "x.fckpt")
    found = read(tmp_path / "run.jsonl").events
    encoded = [event for event in found if event.kind == "ChunkEncoded"]
    stored = [event for event in found if event.kind == "ChunkStored"]
    assert sum(event.n_bytes("raw_bytes") for event in encoded) == 12_000_040
    assert sorted(event.n_bytes("record") for event in encoded) == [event.n_bytes("record") for event in stored]
    assert {event.thread_name for event in stored} == {"MainThread"}
    assert all(event.thread_name.startswith("fastckpt-save-") for event in encoded)
    assert all(event.seconds() > 0 for event in encoded)
    assert all(event.seconds() > 0 for event in found if event.kind == "ChunkLoaded")
    (finished,) = (event for event in found if event.kind == "SaveFinished")
    assert all(finished.end_s - finished.seconds() < event.end_s <= finished.end_s for event in encoded)


def test_events_of_a_checkpointer(tmp_path: Path) -> None:
    model = torch.nn.Linear(1000, 1000)
    with events.record(tmp_path / "run.jsonl"), fastckpt.Checkpointer(tmp_path / "r", {"m": model}, spot=None) as ckpt:
        ckpt.restore()
        ckpt.save_now(7).wait()
    found = read(tmp_path / "run.jsonl").events
    packs = [event for event in found if event.kind == "PackStored"]
    assert packs
    for event in packs:
        assert event.step() == 7
        assert event.thread_name.startswith("fastckpt-upload-")
        assert event.seconds() > 0
    (durable,) = (event for event in found if event.kind == "CheckpointDurable")
    assert sum(event.n_bytes("stored_bytes") for event in packs) <= durable.n_bytes("stored_bytes")


def test_existing_files_are_left_alone_and_names_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("mine")
    names = []
    for _ in range(2):
        with events.record(tmp_path / "a.jsonl") as recorder:
            names.append(Path(recorder.path).name)
    assert names == ["a-1.jsonl", "a-2.jsonl"]
    assert (tmp_path / "a.jsonl").read_text() == "mine"
    monkeypatch.setenv("RANK", "5")
    with events.record(tmp_path / "{pid}.{rank}.{x}.jsonl") as recorder:
        assert Path(recorder.path).name == f"{os.getpid()}.5.{{x}}.jsonl"


def test_a_path_that_cannot_be_made_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), events.record(tmp_path / "none" / "a.jsonl"):
        pass


def test_a_full_disk_ends_the_recording_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    with events.record(tmp_path / "run.jsonl") as recorder, caplog.at_level(logging.WARNING, "fastckpt"):
        time.sleep(0.2)  # the first line is written
        with monkeypatch.context() as patched:
            patched.setattr(recording.os, "write", full)  # type: ignore[attr-defined]
            events.emit(deferred(1))
            recorder._thread.join(30)
        fastckpt.save({"a": torch.arange(3)}, tmp_path / "x.fckpt")
        assert recorder._queue.qsize() == 0
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    assert torch.equal(fastckpt.load(tmp_path / "x.fckpt")["a"], torch.arange(3))
    assert read(tmp_path / "run.jsonl").events == []


def test_a_recording_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "MAX_RECORDING_BYTES", 5000)
    with events.record(tmp_path / "run.jsonl"):
        for step in range(100):
            events.emit(deferred(step))
    assert "longer than 5000 bytes" in caplog.text
    assert (tmp_path / "run.jsonl").stat().st_size <= 5000


def test_a_queue_that_is_full_drops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "_MAX_WAITING", 10)
    monkeypatch.setattr(recording, "_GATHER_S", 30.0)  # the writer waits until `close` wakes it
    with events.record(tmp_path / "run.jsonl") as recorder:
        for step in range(100):
            events.emit(deferred(step))
    assert recorder.dropped >= 80
    assert f"{recorder.dropped} events are missing" in caplog.text
    found = read(tmp_path / "run.jsonl")
    assert len(found.events) == 100 - recorder.dropped
    assert f"{recorder.dropped} events are missing" in found.notes[0]


def test_what_an_event_carries_cannot_end_the_recording(tmp_path: Path) -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with events.record(tmp_path / "run.jsonl"):
        events.emit(events.SaveFailed(target="\ud800\n\x1b" * 1000, error=Rude()))
        events.emit(events.FinalSave(target="t", step=1, source="s", seconds_left=float("inf")))
        events.emit(events.FinalSave(target="t", step=1, source="s", seconds_left=-3.5))
        events.emit(events.SaveFailed(target="t", error=OSError(5, "Input/output error")))
    first, second, third, fourth = read(tmp_path / "run.jsonl").events
    assert first.text("error") == "<Rude>"
    assert len(first.text("target")) <= recording.MAX_TEXT
    assert second.data["seconds_left"] is None
    assert third.data["seconds_left"] == 0
    assert fourth.text("error") == "OSError: [Errno 5] Input/output error"


@pytest.mark.alone
def test_emitting_is_cheap_and_from_many_threads(tmp_path: Path) -> None:
    def emit_many() -> None:
        for step in range(1000):
            events.emit(deferred(step))

    with events.record(tmp_path / "run.jsonl"):
        threads = [threading.Thread(target=emit_many, name=f"t{n}") for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read(tmp_path / "run.jsonl").events
    assert len(found) == 8000
    for thread in threads:
        assert [e.step() for e in found if e.thread_name == thread.name] == list(range(1000))

    with events.record(tmp_path / "timed.jsonl"):
        best = min(_seconds_to_emit(1000) for _ in range(20))
    # Some 1 µs on a quiet machine, 5 while the writer has the interpreter's lock; the bound is for loaded ones.
    assert best / 1000 < 50e-6


def _seconds_to_emit(count: int) -> float:
    event = deferred(1)
    started = time.perf_counter()
    for _ in range(count):
        events.emit(event)
    return time.perf_counter() - started


def test_enabled(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCKPT_TRACE", raising=False)
    events.emit(deferred(1))  # by now the environment has been read
    assert not events.enabled()
    with events.subscribe(lambda event: None):
        assert events.enabled()
    with caplog.at_level(logging.DEBUG, "fastckpt"):
        assert events.enabled()


def test_close_twice_and_late_events(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.jsonl")
    recorder(deferred(1))
    recorder.close()
    recorder(deferred(2))
    recorder.close()
    assert [event.step() for event in read(recorder.path).events] == [1]
