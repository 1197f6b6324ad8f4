"""Files made to do harm, with every checksum right: the parsers behind the checksums must hold on their own."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

import fastckpt
from fastckpt.errors import CheckpointError, CorruptCheckpointError
from fastckpt.format import directory_columns, directory_reader
from fastckpt.format.digest import crc64nvme
from fastckpt.format.records import LAYOUT
from tests.faults.tools import Parts, allowed, container_of, fetch_all, outcome, seeded

LIMIT = 64 << 20
SLOW_S = 10.0
NUMBERS = [0, 1, 2, 3, 63, 64, 255, 1 << 20, (4 << 20) + 1, (1 << 31) - 1, (1 << 32) - 1, (1 << 62), (1 << 63) - 1]


@pytest.fixture(autouse=True)
def _limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_MAX_LOAD_BYTES", str(LIMIT))


@cache
def small() -> bytes:
    weight = torch.randn(2400, generator=torch.Generator().manual_seed(1))
    return container_of(
        {
            "weight": weight,
            "tied": weight,
            "bf16": weight[:1200].to(torch.bfloat16).abs(),
            "view": weight[3:90:4],
            "ints": torch.arange(40),
            "zeros": torch.zeros(90),
            "parameter": torch.nn.Parameter(torch.arange(4.0)),
        }
    )


def junk(rng: random.Random) -> Any:
    deep: Any = 1
    for _ in range(rng.choice([3, 300, 900])):
        deep = [deep]
    values = [None, True, False, -1, 1.5, 1e300, "", "x", "float64", "numpy:<f8", "numpy:|V9", "meta", "cpu"]
    values += ["numpy:<M8[0s]", "numpy:<U999999999", "\ud800", [], {}, [[]], [0, 0, 1], [1 << 63], deep, {"repr": "x"}]
    return rng.choice([*values, *NUMBERS, 10**18, 1 << 64])


def mutate_json(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """The value with one place in it replaced, removed or doubled."""
    if depth > 5 or not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return junk(rng)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = rng.random()
    if action < 0.08:
        del value[key]
    elif action < 0.12 and isinstance(value, list):
        value.extend(copy.deepcopy(value[key]) for _ in range(rng.choice([1, 70])))
    else:
        value[key] = mutate_json(rng, value[key], depth + 1)
    return value


def directory_case(rng: random.Random) -> bytes:
    parts = Parts.of(small())
    value = json.loads(parts.directory)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        value = mutate_json(rng, value)
    text = json.dumps(value).encode()
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice([b"9" * 5000, b"[" * 5000, b"NaN", b'"a":1,"a":2,', b"\0", b"\xff"]) + text[at:]
    parts.directory = text
    return parts.build()


def file_table_case(rng: random.Random) -> bytes:
    parts = Parts.of(small())
    parts.file_table = rng.choice([json.dumps([junk(rng)]).encode(), json.dumps(junk(rng)).encode(), rng.randbytes(9)])
    return parts.build()


def record_case(rng: random.Random) -> bytes:
    parts = Parts.of(small())
    rows = np.frombuffer(parts.records, LAYOUT).copy()
    for _ in range(rng.choice([1, 1, 2, 4])):
        field = rng.choice([name for name in LAYOUT.names or () if name not in ("digest", "parameter")])
        row = rng.randrange(len(rows))
        width = 8 * LAYOUT[field].itemsize
        rows[field][row] = rng.choice(
            [rng.getrandbits(width), rng.choice(NUMBERS) % (1 << width), rows[field][row - 1]]
        )
    parts.records = rng.choice([rows, rows, rows, rows[:-1], np.concatenate([rows, rows]), rows[::-1]]).tobytes()
    return parts.build()


def footer_case(rng: random.Random) -> bytes:
    data = bytearray(small())
    at = len(data) - 256 + rng.choice([*range(0, 160, 8), 224, 232])
    old = int.from_bytes(data[at : at + 8], "little")
    new = rng.choice([rng.getrandbits(64), rng.choice(NUMBERS), old + rng.choice([-64, -1, 1, 64]), (1 << 64) - old])
    data[at : at + 8] = (new % (1 << 64)).to_bytes(8, "little")
    data[-16:-8] = crc64nvme(bytes(data[-256:-16])).to_bytes(8, "little")
    return bytes(data)


def header_case(rng: random.Random) -> bytes:
    parts = Parts.of(small())
    body = bytearray(parts.header[:56])
    at = rng.randrange(8, 56)
    body[at] = rng.randrange(256)
    parts.header = bytes(body) + crc64nvme(bytes(body)).to_bytes(8, "little")
    return parts.build()


def hostile_frame(rng: random.Random, frame: bytes) -> bytes:
    size = zstandard.get_frame_parameters(frame).content_size
    choice = rng.randrange(7)
    if choice == 0:  # a bomb
        return zstandard.ZstdCompressor().compress(bytes(rng.choice([size + 1, 1 << 20, 64 << 20])))
    if choice == 1:  # garbage behind a right header
        return frame[:8] + rng.randbytes(len(frame) - 8)
    if choice == 2:  # the header says any size and any window
        return frame[:4] + bytes([rng.randrange(256)]) + rng.randbytes(13) + frame[6:]
    if choice == 3:
        return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))
    if choice == 4:
        return frame + rng.choice([b"\0", frame, b"\x50\x2a\x4d\x18\0\0\0\0"])
    if choice == 5:
        return frame[: rng.randrange(1, len(frame))]
    changed = bytearray(frame)
    for _ in range(rng.choice([1, 3, 20])):
        changed[rng.randrange(4, len(frame))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def frame_case(rng: random.Random) -> bytes:
    parts = Parts.of(small())
    rows = np.frombuffer(parts.records, LAYOUT).copy()
    row = rng.choice([i for i in range(len(rows)) if rows["transform"][i] in (3, 4)])
    begin, size = int(rows["offset"][row]) - 64, int(rows["stored_bytes"][row])
    frame = hostile_frame(rng, parts.payload[begin : begin + size])
    parts.payload = parts.payload[:begin] + frame + parts.payload[begin + size :]
    rows["offset"][rows["offset"] > begin + 64] += np.uint64((len(frame) - size) % (1 << 64))
    rows["stored_bytes"][row], rows["crc64nvme"][row] = len(frame), crc64nvme(frame)
    parts.records = rows.tobytes()
    return parts.build()


SNIPPETS = (
    b"cos\nsystem\n(X\x04\0\0\0true\x85R",
    b"cbuiltins\neval\n(X\x01\0\0\x001tR",
    b"ctorch\nload\n",
    b"(lQ",
    b"X\x01\0\0\0aQ",
    b"c_codecs\nencode\nX\x02\0\0\0\xc3\xbfX\x06\0\0\0latin1\x86R",
    b"ccollections\nCounter\n)R",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    b"NNNtR",
    b"\x94h\x00",
    b"0",
    b".",
    b"\x8a\xffx",
)


def skeleton_case(rng: random.Random) -> bytes:
    parts = Parts.of(small())
    data = bytearray(parts.skeleton)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(2, len(data))
        action = rng.random()
        if action < 0.35:
            data[at] = rng.randrange(256)
        elif action < 0.55:
            data[at:at] = rng.choice(SNIPPETS)
        elif action < 0.75:
            del data[at : at + rng.choice([1, 2, 8, 99999])]
        else:
            data[at] = rng.choice(b"(.0)2NQRbcdehjqrstu}]al\x80\x81\x85\x86\x87\x88\x89\x8a\x8b")
    parts.skeleton = bytes(data)
    return parts.build()


CASES: dict[str, Callable[[random.Random], bytes]] = {
    "directory": directory_case,
    "file table": file_table_case,
    "records": record_case,
    "footer": footer_case,
    "header": header_case,
    "frames": frame_case,
    "skeleton": skeleton_case,
}
COUNTS = {
    "directory": 700,
    "records": 400,
    "skeleton": 500,
    "frames": 300,
    "footer": 200,
    "header": 100,
    "file table": 100,
}


def problems_of(data: bytes) -> list[str]:
    """What is not allowed about how load and open answer."""
    found = []
    started = time.monotonic()
    errors = [outcome(fastckpt.load, io.BytesIO(data))]
    fetched = outcome(lambda: errors.extend(fetch_all(io.BytesIO(data)).values()))
    for error in [*errors, fetched]:
        if isinstance(error, BaseException) and not allowed(error):
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            assert trace is not None
            place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            found.append(f"{type(error).__name__} at {place}: {str(error)[:90]}")
    if time.monotonic() - started > SLOW_S:
        found.append(f"took more than {SLOW_S} s")
    return found


def run_cases(kind: str, count: int, salt: str = "") -> Counter[str]:
    rng = seeded(kind + salt)
    return Counter(problem for _ in range(count) for problem in problems_of(CASES[kind](rng)))


@pytest.mark.parametrize("kind", COUNTS)
def test_only_known_errors(kind: str) -> None:
    """Up to 12 s: hundreds of files each; 2,300 in all."""
    found = run_cases(kind, COUNTS[kind])
    assert not found, "\n".join(f"{n} × {text}" for text, n in found.most_common(20))


def test_rows_read_at_a_glance_are_read_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right is taken without a closer look: that must find the same, and pass over nothing."""
    rng = seeded("at a glance")
    raw_bytes = np.frombuffer(Parts.of(small()).records, LAYOUT)["raw_bytes"]
    cases = [Parts.of(directory_case(rng)).directory for _ in range(300)]

    def read() -> list[str]:
        found = []
        for case in cases:
            try:
                found.append(repr(directory_reader.parse(case, raw_bytes, "x")))
            except CheckpointError as error:
                found.append(f"{type(error).__name__} {error}")
        return found

    at_a_glance = read()
    monkeypatch.setattr(directory_columns, "parse", lambda *_: None)
    assert at_a_glance == read()


CHILD = """
import faulthandler, os, resource
import torch, fastckpt
from tests.faults import test_hostile
faulthandler.enable()
fastckpt.load.__module__
test_hostile.run_cases("frames", 3, "warm up")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
for kind in test_hostile.CASES:
    found = test_hostile.run_cases(kind, 60, " child")
    assert not any("MemoryError" in text for text in found), found
print("ALL DONE")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_child_with_little_memory_survives() -> None:
    """No crash, and no allocation far beyond the limit: 512 MiB of address space more must do."""
    environment = {**os.environ, "FASTCKPT_MAX_LOAD_BYTES": str(LIMIT), "FASTCKPT_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ALL DONE" in done.stdout


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("weights_only", [None, True])
def test_foreign_code_does_not_run(tmp_path: Path, weights_only: bool | None) -> None:
    parts = Parts.of(small())
    target = tmp_path / "created"
    for protocol in range(6):
        parts.skeleton = pickle.dumps({"a": 1, "b": _Payload(target)}, protocol)
        with pytest.raises((pickle.UnpicklingError, CheckpointError)):
            fastckpt.load(io.BytesIO(parts.build()), weights_only=weights_only)
        fetch_all(io.BytesIO(parts.build()))
        fastckpt.get_unsafe_globals(io.BytesIO(container_of([1])))
        assert not target.exists()


def test_an_unsafe_global_at_the_end_does_not_lift_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds also where the load will be refused in the end: storages are taken before the refusal."""
    data = container_of({"a": torch.zeros(4 << 20)})
    parts = Parts.of(data)
    parts.skeleton = parts.skeleton[:-1] + b"0cos\nsystem\n."
    monkeypatch.setenv("FASTCKPT_MAX_LOAD_BYTES", str(1 << 20))
    tracemalloc.start()
    error = outcome(fastckpt.load, io.BytesIO(parts.build()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, (CheckpointError, pickle.UnpicklingError))
    assert peak < 12 << 20, f"{peak} bytes were allocated under a limit of 1 MiB"


@pytest.mark.parametrize("records", [2000, 20000])
def test_findings_do_not_take_far_more_than_the_file(records: int) -> None:
    parts = Parts.of(small())
    parts.records = seeded("garbage").randbytes(64 * records)
    data = parts.build()
    tracemalloc.start()
    error = outcome(fastckpt.load, io.BytesIO(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, CorruptCheckpointError)
    assert peak < 32 * len(data) + (8 << 20), f"{peak} bytes for a file of {len(data)}"
