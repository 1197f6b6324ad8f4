"""Recordings → traces, summaries and pictures: of any events, of real saves, and of files that a stranger made."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastckpt
from fastckpt import events
from fastckpt.trace import Recorded, Recording, RecordingError, draw, parse, parsing, read, summarize, to_chrome
from fastckpt.trace.recorder import MAX_LINE_BYTES
from fastckpt.trace.stages import COMMIT, ENCODE, STAGE, STAGES, STALL, UPLOAD, Span, covered_s, lanes, union
from fastckpt.trace.summary import to_json

HEADER = {"fastckpt_recording": 1, "pid": 7, "rank": None, "unix_s": 1000.0, "origin_s": 10.0, "fastckpt": "0.1.0"}


def recording(*events: Recorded, pid: int = 7, name: str = "run.jsonl") -> Recording:
    return Recording(name, pid, None, "fastckpt 0.1.0", "", sorted(events, key=lambda e: e.end_s), [])


def event(kind: str, end_s: float, thread_name: str = "MainThread", /, **data: Any) -> Recorded:
    return Recorded(kind, end_s, hash(thread_name) & 0xFFFF, thread_name, data)


def file(*lines: Any, header: dict[str, Any] | None = None) -> io.BytesIO:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in [header or HEADER, *lines]]
    return io.BytesIO(("\n".join(texts) + "\n").encode())


def line(**changes: Any) -> dict[str, Any]:
    return {"event": "SaveDeferred", "t": 11.0, "tid": 1, "thread": "MainThread", "data": {"step": 1}, **changes}


# -- any events ------------------------------------------------------------------------------------------------------------

KINDS = [kind.__name__ for kind in events.Event.__subclasses__()] + ["Novel"]
TEXT = st.text(max_size=12) | st.sampled_from(["t", "t step 3", "MainThread", "fastckpt-save-1", "$x$", "\x1b[2J"])
NUMBER = st.integers(0, 1 << 60) | st.floats(0, 1e8) | st.none() | st.integers(0, 5)
FIELDS = (
    "target step raw_bytes stored_bytes seconds durable_s skeleton_s encode_s write_s raw_s device file_bytes record error why source "
    "raw_bytes_full why_full"
)
DATA = st.dictionaries(st.sampled_from(FIELDS.split()), NUMBER | TEXT | st.booleans(), max_size=8)
EVENT = st.builds(Recorded, st.sampled_from(KINDS), st.floats(0, 1e9) | st.floats(0, 10), st.integers(0, 3), TEXT, DATA)
RECORDING = st.builds(
    lambda found, pid: recording(*found, pid=pid), st.lists(EVENT, max_size=30), st.integers(0, 1 << 63)
)


@given(st.lists(RECORDING, max_size=3))
def test_any_events_make_a_valid_trace(recordings: list[Recording]) -> None:
    found = json.loads(json.dumps(list(to_chrome(recordings)), allow_nan=False))
    spans = [one for one in found if one["ph"] != "M"]
    assert [one["ts"] for one in spans] == sorted(one["ts"] for one in spans)
    assert all(one["ts"] >= 0 for one in found)
    assert all(one["dur"] >= 0 for one in spans if one["ph"] == "X")
    shown = sum(one["ph"] in "Xi" and one["name"] != "get raw bytes" for one in spans)
    assert shown == sum(len(one.events) for one in recordings)
    named = {(one["pid"], one["tid"]) for one in found if one["name"] == "thread_name"}
    assert {(one["pid"], one["tid"]) for one in spans if one["ph"] in "Xi"} <= named
    assert len({one["pid"] for one in found if one["name"] == "process_name"}) == len(recordings)


@given(st.lists(RECORDING, max_size=2))
def test_any_events_make_a_summary(recordings: list[Recording]) -> None:
    summary = summarize(recordings)
    json.dumps(to_json(recordings, summary), allow_nan=False)
    for save in summary.saves:
        assert save.seconds >= 0
        assert all(0 <= save.wall_s(stage) <= save.busy_s(stage) * (1 + 1e-9) + 1e-6 for stage in STAGES)
        assert isinstance(save.bottleneck, str)


def test_a_time_below_the_clocks_tick_gives_no_speed() -> None:
    found = [event("PackStored", 2.2e-309, seconds=1), event("CheckpointDurable", 0.0, stored_bytes=1)]
    recordings = [recording(*found)]
    summary = summarize(recordings)
    json.dumps(to_json(recordings, summary), allow_nan=False)
    assert [save.speed(stage) for save in summary.saves for stage in STAGES] == [None] * len(STAGES) * len(
        summary.saves
    )
    assert summary.saves


SPANS = st.lists(
    st.builds(lambda a, b: Span(float(min(a, b)), float(max(a, b))), st.integers(0, 30), st.integers(0, 30))
)


@given(SPANS)
def test_lanes_and_unions(spans: list[Span]) -> None:
    chosen = lanes(spans)
    for n, one in enumerate(spans):
        for m in range(n):
            if chosen[n] == chosen[m]:
                assert one.end_s <= spans[m].start_s or spans[m].end_s <= one.start_s
    ticks = {t for span in spans for t in range(int(span.start_s), int(span.end_s))}
    assert covered_s(spans) == len(ticks)
    assert all(a.end_s < b.start_s for a, b in itertools.pairwise(union(spans)))


# -- meaning -----------------------------------------------------------------------------------------------------------------


def a_save(step: int, at: float) -> list[Recorded]:
    """One of a Checkpointer: staged in 1 s by two threads, encoded in 4, put in 2, committed in 0.5."""
    url = "s3://bucket/run"
    return [
        event("SnapshotStarted", at, target=url, step=step, raw_bytes=2_000_000, storages=2),
        event("PieceStaged", at + 1, "fastckpt-stage-0", target=url, step=step, raw_bytes=10**6, seconds=1.0),
        event("PieceStaged", at + 1, "fastckpt-stage-1", target=url, step=step, raw_bytes=10**6, seconds=0.5),
        event("FenceWaited", at + 1.5, target=url, step=step, seconds=0.25, why="optimizer step"),
        event("SnapshotStaged", at + 1, "fastckpt-stage-0", target=url, step=step, raw_bytes=2_000_000, seconds=1.0),
        event("SaveStarted", at + 1, "q", target=f"{url} step {step}", raw_bytes=2_000_000, skeleton_s=0.0),
        event("ChunkEncoded", at + 3, "s-0", target=f"{url} step {step}", raw_bytes=10**6, seconds=2.0),
        event("ChunkEncoded", at + 5, "s-1", target=f"{url} step {step}", raw_bytes=10**6, seconds=4.0),
        event("ChunkStored", at + 5, "q", target=f"{url} step {step}", stored_bytes=1_500_000, write_s=0.1),
        event("PackStored", at + 6, "u-0", target=url, step=step, stored_bytes=1_500_000, seconds=2.0),
        event("SaveFinished", at + 6.1, "q", target=f"{url} step {step}", file_bytes=1_500_100, seconds=5.1),
        event("CheckpointDurable", at + 6.5, "q", target=url, step=step, stored_bytes=1_500_100, seconds=6.5),
    ]


def test_the_stages_of_a_save() -> None:
    # The second is staged while the first is put: each event finds its own.
    summary = summarize([recording(*a_save(10, 100.0), *a_save(20, 104.5))])
    assert [save.step for save in summary.saves] == [10, 20]
    for save in summary.saves:
        assert (save.state, save.raw_bytes, save.stored_bytes) == ("durable", 2_000_000, 1_500_100)
        assert save.seconds == pytest.approx(6.5)
        walls = {stage: save.wall_s(stage) for stage in STAGES}
        assert walls == pytest.approx({STALL: 0.25, STAGE: 1.0, ENCODE: 4.0, UPLOAD: 2.0, COMMIT: 0.5})
        assert save.busy_s(ENCODE) == pytest.approx(6.0)
        assert save.speed(ENCODE) == pytest.approx(0.5e6)
        assert save.bottleneck == "encode (4 of 6.5 s, 1.5 threads at once)"


def test_a_step_that_is_tried_again_is_another_save() -> None:
    failed = [
        event("SaveStarted", 1, target="u step 5", raw_bytes=10),
        event("SaveFailed", 2, target="u step 5", error="StoreError: no"),
    ]
    again = [
        event("SaveStarted", 3, target="u step 5", raw_bytes=10),
        event("CheckpointDurable", 4, target="u", step=5, seconds=1.0),
    ]
    first, second = summarize([recording(*failed, *again)]).saves
    assert (first.state, first.error, second.state) == ("failed", "StoreError: no", "durable")


def test_stages_that_take_alike_are_both_named_and_waiting_is_told() -> None:
    both = [
        event("ChunkEncoded", 10, "a", target="x", seconds=9.0),
        event("ChunkStored", 10, "b", target="x", write_s=8.5, stored_bytes=1),
        event("SaveFinished", 10, "c", target="x", seconds=10.0),
    ]
    assert summarize([recording(*both)]).saves[0].bottleneck.startswith("encode and upload (9 of 10 s")
    idle = [event("ChunkEncoded", 1, "a", target="x", seconds=1.0), event("SaveFinished", 10, target="x", seconds=10.0)]
    assert summarize([recording(*idle)]).saves[0].bottleneck.startswith("none at work for 9 of 10 s")


def test_threads_of_one_name_share_a_row() -> None:
    one = [Recorded("ChunkEncoded", float(n), n, "fastckpt-save-0", {"seconds": 0.5}) for n in range(1, 5)]
    two = [Recorded("ChunkEncoded", 4.0, 99, "fastckpt-save-0", {"seconds": 0.5})]
    found = list(to_chrome([recording(*one, *two)]))
    assert len({e["tid"] for e in found if e["ph"] == "X"}) == 2
    assert [e["args"]["name"] for e in found if e["name"] == "thread_name"] == ["fastckpt-save-0"] * 2


def test_overlapping_copies_of_a_device_get_rows_of_their_own() -> None:
    copies = [event("PieceStaged", 5.0 + n, "copier", device="cuda:0", seconds=2.0) for n in range(6)]
    found = [e for e in to_chrome([recording(*copies)]) if e["ph"] == "X"]
    assert len({e["tid"] for e in found}) == 2
    for row in {e["tid"] for e in found}:
        ends = [(e["ts"], e["ts"] + e["dur"]) for e in found if e["tid"] == row]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def test_raw_bytes_are_staging_where_there_is_no_snapshot() -> None:
    chunk = event("ChunkEncoded", 10.0, "w", target="x", seconds=2.0, raw_s=1.0)
    (save,) = summarize([recording(chunk)]).saves
    assert (save.wall_s(STAGE), save.wall_s(ENCODE)) == (1.0, 2.0)
    started = event("SnapshotStarted", 1.0, target="x", step=None)
    (save,) = summarize([recording(started, chunk)]).saves
    assert (save.wall_s(STAGE), save.wall_s(ENCODE)) == (0.0, 2.0)
    spans = [(e["name"], e["ts"], e["dur"]) for e in to_chrome([recording(chunk)]) if e["ph"] == "X"]
    assert spans == [("get raw bytes", 0.0, 1e6), ("encode chunk", 1e6, 2e6)]


def test_counters_end_with_the_total() -> None:
    chunks = [event("ChunkEncoded", 1 + n * 1e-5, target="x", raw_bytes=10, seconds=0.0) for n in range(1000)]
    found = [e for e in to_chrome([recording(*chunks)]) if e["ph"] == "C"]
    assert found[-1]["args"] == {"bytes": 10_000}
    assert 5 <= len(found) <= 15, "one a millisecond is enough"


def test_processes_are_put_in_time_by_the_wall_clock() -> None:
    first = parse(file(line(t=11.0)), "a")
    second = parse(file(line(t=5000.5), header={**HEADER, "origin_s": 5000.0}), "b")
    found = [e for e in to_chrome([first, second]) if e["ph"] == "i"]
    assert [e["ts"] for e in found] == pytest.approx([0.0, 500_000.0])
    assert len({e["pid"] for e in found}) == 2, "the same pid on two machines"


def test_a_real_save_makes_a_trace_and_a_summary(tmp_path: Path) -> None:
    state = {"a": torch.randn(3_000_000)}
    with events.record(tmp_path / "run.jsonl"):
        fastckpt.save(state, tmp_path / "x.fckpt")
        with fastckpt.Checkpointer(tmp_path / "r", {"m": state}, spot=None) as ckpt:
            ckpt.save_now(4).wait()
        fastckpt.load(tmp_path / "x.fckpt")
    found = read(tmp_path / "run.jsonl")
    summary = summarize([found])
    container, checkpoint = summary.saves
    assert (container.state, container.step, checkpoint.state, checkpoint.step) == ("written", None, "durable", 4)
    assert container.stored_bytes == (tmp_path / "x.fckpt").stat().st_size
    assert container.raw_bytes == checkpoint.raw_bytes == 12_000_000
    assert container.busy_s(STALL) > 0, "it kept the main thread"
    for save in summary.saves:
        assert save.wall_s(ENCODE) > 0
        assert save.wall_s(UPLOAD) > 0
        assert save.wall_s(COMMIT) > 0
        assert save.bottleneck
    assert [load.raw_bytes for load in summary.loads] == [12_000_000]
    chrome = list(to_chrome([found]))
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in chrome if e["name"] == "thread_name"}
    at = {e["name"]: rows[e["pid"], e["tid"]].rstrip("0123456789") for e in chrome if e["ph"] == "X"}
    assert at["encode chunk"] == "fastckpt-save-"
    assert at["put pack"] == "fastckpt-upload-"
    assert at["until durable"] == "saves, call to durable"
    assert at["load chunk"] == "fastckpt-load-"


def test_what_became_of_a_save_against_the_one_before(tmp_path: Path) -> None:
    frozen, trained = torch.randn(400_000), torch.randn(300_000)
    state = {"m": {"a": frozen, "b": trained}}
    with (
        events.record(tmp_path / "run.jsonl"),
        fastckpt.Checkpointer(tmp_path / "r", state, every=None, spot=None) as ckpt,
    ):
        ckpt.save_now(1).wait()
        trained.copy_(torch.randn(300_000))
        ckpt.save_now(2).wait()
    first, second = summarize([read(tmp_path / "run.jsonl")]).saves
    assert (first.step, first.against, first.why_full) == (1, {}, "")
    assert (second.step, second.against) == (2, {"equal": 1_600_000, "full": 1_200_000})


def test_why_a_save_was_written_in_full() -> None:
    told = event("DeltasUsed", 2.0, target="s3://b/r step 7", step=7, why_full="the base was retired", raw_bytes_full=9)
    (save,) = summarize([recording(event("SaveStarted", 1.0, target="s3://b/r step 7", skeleton_s=0.0), told)]).saves
    assert (save.why_full, save.against) == ("the base was retired", {"full": 9})


# -- pictures ----------------------------------------------------------------------------------------------------------------


def test_a_picture_of_many_saves_of_hostile_names_and_of_none() -> None:
    pytest.importorskip("matplotlib")
    odd = [event("SaveFailed", 9e3, target="$\\frac{\x1b\ud800 \U0001f600" * 40, error="$_{" * 300)]
    many = [e for n in range(20) for e in a_save(n, 100.0 * n)]
    for found in ([], odd, [*many, *odd]):
        assert draw(summarize([recording(*found)]), "$\\broken{").startswith(b"\x89PNG")


# -- a stranger's file ---------------------------------------------------------------------------------------------------------


def test_a_last_line_that_was_cut_is_left_out() -> None:
    whole = file(line(), line()).getvalue()
    for cut in range(1, 40):
        found = parse(io.BytesIO(whole[:-cut]), "run.jsonl")
        assert len(found.events) == 1
        assert "last line was cut" in found.notes[0]
    assert not parse(io.BytesIO(whole), "run.jsonl").notes


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (io.BytesIO(b""), "is no recording .* empty"),
        (io.BytesIO(b"hello\n"), "is no recording"),
        (io.BytesIO(b"\x80\x02}\n" * 50), "is no recording"),
        (io.BytesIO(b"[1]\n"), "is no recording"),
        (io.BytesIO(b"{}\n"), "does not say"),
        (file(header={**HEADER, "fastckpt_recording": 2}), "version 2; this fastckpt reads version 1"),
        (file(header={**HEADER, "fastckpt_recording": "x" * 9999}), "version x"),
        (file(header={**HEADER, "origin_s": -1}), "no time"),
        (file(header={**HEADER, "unix_s": 1e300}), "no time"),
        (file("{", line()), "line 2"),
        (file("[]", line()), "line 2"),
        (file("[" * 60_000), "line 2"),
        (file(line(), '{"t": NaN}', line()), "line 3.*NaN"),
        (file(line(), "9" * 10_000), "line 3"),
        (file(line(t=-1)), "line 2"),
        (file(line(t=1e9)), "line 2"),
        (file('{"event":"x","t":1e999,"tid":1,"thread":"","data":{}}'), "line 2"),
        (file(line(tid=1.5)), "line 2"),
        (file(line(tid=1 << 70)), "line 2"),
        (file(line(event=None)), "line 2"),
        (file(line(data=[])), "line 2"),
        (file(line(data={"seconds": 1 << 2000})), "seconds is out of range"),
        (file(line(data={str(n): 1 for n in range(51)})), "fields"),
        (file(line(thread="x" * MAX_LINE_BYTES)), "longer than"),
        (io.BytesIO(b"x" * (MAX_LINE_BYTES + 2)), "longer than"),
    ],
)
def test_damage_is_named_with_its_line(found: io.BytesIO, words: str) -> None:
    with pytest.raises(RecordingError, match=words):
        parse(found, "run.jsonl")


def test_files_events_and_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lines_ = [line(tid=n) for n in range(30)]
    limits = {"MAX_EVENTS": 20, "_MAX_THREADS": 20, "MAX_RECORDING_BYTES": 999}
    words = ["more than 20 events", "20 threads", "the file is longer than 999 bytes"]
    for (name, limit), expected in zip(limits.items(), words, strict=True):
        with monkeypatch.context() as patched:
            patched.setattr(parsing, name, limit)
            with pytest.raises(RecordingError, match=expected):
                parse(file(*lines_), "x")


def test_values_of_other_kinds_are_tamed() -> None:
    data = {
        "seconds": "long",
        "raw_bytes": 1.5,
        "step": True,
        "target": 3,
        "error": ["x"],
        "left_s": -4,
        "k" * 9999: "v" * 9999,
    }
    (found,) = parse(file(line(data=data, thread="\ud800")), "x").events
    assert (found.seconds(), found.n_bytes("raw_bytes"), found.step(), found.text("target")) == (0.0, 0, None, "")
    assert found.data["error"] is None
    assert found.data["left_s"] == 0
    assert max(map(len, found.data)) == 500
    json.dumps(list(to_chrome([recording(found)]))).encode()


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_an_error_or_a_recording(data: bytes) -> None:
    for start in (b"", json.dumps(HEADER).encode() + b"\n"):
        try:
            found = parse(io.BytesIO(start + data), "x")
        except RecordingError:
            continue
        list(to_chrome([found]))
