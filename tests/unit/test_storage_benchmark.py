"""benchmarks/storage.py: its bars, its table, its model, and what its workers do, with a state of 2 MB. No speeds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ROOT, scale_model, storage_floor, storage_lock, storage_report, storage_rows, storage_worker
from benchmarks.scale_model import Node, save_of
from benchmarks.storage_contenders import OURS, WHERE, make
from benchmarks.storage_contenders.base import ONE, Place, flat, live

SECONDS: list[dict[str, Any]] = [{"seconds": 1.0}, {"seconds": 3.0}, {"seconds": 2.0}, {"error": "lost"}]


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "tiny.pt"
    torch.save(live("tiny").state(), path)
    return path


def test_a_bar_is_the_best_rival_s_median_times_the_factor() -> None:
    rivals: dict[str, list[dict[str, Any]]] = {
        "slow": [{"seconds": 9.0}],
        "fast": SECONDS,
        "broken": [{"error": "no room"}],
    }
    found = storage_rows.against_best("s3", "restore", "≤ 0.9 ×", [{"seconds": 1.7}], rivals, 0.9)
    assert found["bar"] == pytest.approx(1.8)
    assert found["met"] is True
    assert found["against"] == {"slow": 9.0, "fast": 2.0}
    assert found["note"] == "broken: no room"
    worse = storage_rows.against_best("s3", "restore", "≤ 0.9 ×", [{"seconds": 1.9}], rivals, 0.9)
    assert worse["met"] is False


def test_a_floor_with_a_factor_is_good_enough() -> None:
    found = storage_rows.row("local", "load", "", [1.1], bar=0.9, floor=1.0, floor_factor=1.15)
    assert found["met"] is True
    assert storage_rows.row("local", "load", "", [1.2], bar=0.9, floor=1.0, floor_factor=1.15)["met"] is False
    assert storage_rows.row("local", "load", "", [1.2])["met"] is None


def test_what_was_not_measured_says_why() -> None:
    found = storage_rows.against_best("s3", "restore", "≤ 0.9 ×", [{"error": "no server"}], {"fast": SECONDS}, 0.9)
    assert (found["measured"], found["met"], found["note"]) == (None, None, "no server")
    assert "| no server |" in "| " + " | ".join(storage_report.cells(found)) + " |"


node_values = st.fixed_dictionaries(
    {field.name: st.floats(0.1, 1.0) for field in dataclasses.fields(Node) if field.name != "state_bytes"}
)


@given(node_values, st.sampled_from(["cores", "core", "link_bytes_per_s", "goodput", "copy_bytes_per_s"]))
def test_more_of_anything_makes_no_save_slower(values: dict[str, float], name: str) -> None:
    node = Node(**values)
    more = dataclasses.replace(node, **{name: 2 * values[name]})
    assert save_of(more).seconds <= save_of(node).seconds
    dearer = dataclasses.replace(node, ratio=2 * node.ratio)
    assert save_of(dearer).seconds >= save_of(node).seconds


def test_the_model_reads_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gib = float(1 << 30)
    floor = {"encode_cpu": 0.3, "raw_bytes": gib, "stored_bytes": 0.83 * gib}
    samples = {"cpu": {"encode alone": [floor]}, "cpu, https": {"Checkpointer": [{"cpu": 1.0}]}}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"samples": samples}))
    assert scale_model.main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"]["other_s_per_gib"] == pytest.approx(0.7)
    link_s = 640e9 * 0.83 / (12.5e9 * 0.9)
    assert found["saves"]["as given"]["link_s"] == pytest.approx(link_s)
    assert found["saves"]["as given"]["processor_s"] == pytest.approx(640e9 / gib / 8)
    path.write_text(json.dumps({"samples": {}}))
    assert scale_model.main([str(path)]) == 1
    assert "make bench-storage" in capsys.readouterr().err


@pytest.mark.parametrize("name", OURS)
def test_our_contenders_bring_back_what_they_save(name: str, state_file: Path, tmp_path: Path) -> None:
    contender, place = make(name), Place(str(tmp_path / "there"), "tiny")
    asked: dict[str, Any] = {"state": str(state_file), "check": True, "repeats": 1}
    saved = storage_worker.save(contender, place, asked)
    contender.close()
    assert saved["seconds"] > 0
    restored = storage_worker.restore(contender, place, asked)
    contender.close()
    assert restored["differences"] == []
    alone = storage_worker.one(contender, place, asked)
    assert alone["bytes"] == flat(torch.load(state_file))[ONE].nbytes


def test_each_contender_has_a_module() -> None:
    for where in WHERE.values():
        module, cls = where.split(":")
        assert f"class {cls}(" in (ROOT / "benchmarks" / "storage_contenders" / f"{module}.py").read_text()


def test_encoding_alone_takes_each_byte(state_file: Path) -> None:
    state = torch.load(state_file)
    found = storage_floor.encode(state)
    assert found["raw_bytes"] >= sum(tensor.nbytes for tensor in flat(state).values())
    assert 0 < found["stored_bytes"] < found["raw_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_place_of_the_interpreter_s_lock() -> None:
    """It says whether the lock is held, and behind it stands how often it changed hands: a sleep gives it to nobody."""
    interval = sys.getswitchinterval()
    address = storage_lock.lock_address()
    assert sys.getswitchinterval() == interval
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        assert int.from_bytes(memory.read(4), "little") in (0, 1)


@pytest.mark.slow
def test_the_benchmark_itself(tmp_path: Path) -> None:
    """Without rivals; each measurement is a process of its own: a minute."""
    command = [sys.executable, "benchmarks/storage.py", "--quick", "--only", "local,cpu", "--rivals", "/nowhere"]
    command += ["--out", str(tmp_path), "--dir", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "| local | local load, warm" in done.stdout
    assert "no environment for rivals" in done.stdout
