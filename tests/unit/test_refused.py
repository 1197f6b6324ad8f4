"""States with types that a restricted load does not take: who saves is told at once, who restores reads what to do."""

from __future__ import annotations

import argparse
import datetime
import io
import logging
import pathlib
import pickle
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import Checkpointer
from fastckpt.errors import CheckpointError, RefusedStateError, RestoreError
from fastckpt.state import refused
from fastckpt.state.rebuild import Rebuild
from fastckpt.state.recapture import Recapturer
from fastckpt.store.memory import MemoryStore


class Foreign:
    """A class that no list has."""


def checkpointer(store: MemoryStore, state: dict[str, Any]) -> Checkpointer:
    return Checkpointer(store, state, every=None, spot=None)


def restored(state: dict[str, Any], into: dict[str, Any], **how: Any) -> None:
    store = MemoryStore()
    with checkpointer(store, state) as ckpt:
        ckpt.save_now(1).wait()
    with checkpointer(store, into) as ckpt:
        assert ckpt.restore(**how) == 1


HARMLESS: dict[str, Any] = {
    "float64": np.float64(0.1),
    "float16": np.float16(2),
    "big endian": np.dtype(">f4").type(3),
    "int64": np.int64(-3),
    "bool": np.bool_(True),
    "complex": np.complex64(1 + 2j),
    "text": np.str_("äb"),
    "bytes": np.bytes_(b"xy"),
    "empty bytes": b"",
    "frozenset": frozenset([1, (2,)]),
    "defaultdict": defaultdict(int, a=1),
    "of lists": defaultdict(list, {"a": [np.float32(1)], 2: []}),
    "no factory": defaultdict(None, {1: 2}),
    "path": pathlib.Path("a") / "b",
    "windows": pathlib.PureWindowsPath("a\\b"),
    "time": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "duration": datetime.timedelta(days=3),
    "namespace": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x")),
    "classes": [int, list, torch.float32],
}
REFUSED: dict[str, tuple[Any, str]] = {
    "array": (np.zeros(3), "numpy._core.multiarray._reconstruct at d.deep.0 "),
    "large array": (np.zeros(20_000), "numpy._core.multiarray._reconstruct at d.deep.0 "),
    "dtype": (np.dtype("f8"), "numpy.dtype at d.deep.0 "),
    "dtype beside a scalar": ([np.float64(1), np.dtype("f8")], "numpy.dtype at d.deep.0.1 "),
    "fields": (np.zeros(1, "i4,f4")[0], "a NumPy scalar that is no plain number or text at d.deep.0 "),
    "date": (np.datetime64("2024-01-01"), "a NumPy scalar that is no plain number or text at d.deep.0 "),
    "huge integer": (-1 << 4000, "an integer of more than 255 bytes at d.deep.0 "),
    "deque": (deque([1]), "collections.deque at d.deep.0 "),
    "foreign factory": (defaultdict(Foreign), "tests.unit.test_refused.Foreign at d.deep.0"),
    "foreign object": ({"x": OrderedDict(y=Foreign())}, "tests.unit.test_refused.Foreign at d.deep.0.x.y"),
    "foreign class": (Foreign, "tests.unit.test_refused.Foreign at d.deep.0"),
    "foreign key": ({Foreign(): 1}, "tests.unit.test_refused.Foreign at d.deep.0"),
}
NUMPY_1 = not hasattr(np, "_core")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_cannot_run_code_is_restored_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    into: dict[str, Any] = {"d": {}}
    restored({"d": {"v": HARMLESS[name]}}, into)
    found, expected = into["d"]["v"], HARMLESS[name]
    assert type(found) is type(expected)
    assert found == expected
    if isinstance(expected, defaultdict):
        assert found.default_factory is expected.default_factory
    assert not caplog.records


def test_files_in_memory_and_lazy_modules_are_restored(caplog: pytest.LogCaptureFixture) -> None:
    class WithExtra(torch.nn.Linear):
        extra: Any = None

        def get_extra_state(self) -> Any:
            return io.BytesIO(b"scales")

        def set_extra_state(self, state: Any) -> None:
            self.extra = state.getvalue()

    into = {"m": WithExtra(2, 2), "lazy": torch.nn.LazyLinear(3)}
    restored({"m": WithExtra(2, 2), "lazy": torch.nn.LazyLinear(3)}, into)
    assert into["m"].extra == b"scales"
    assert isinstance(into["lazy"].weight, torch.nn.UninitializedParameter)
    assert not caplog.records


@pytest.mark.skipif(NUMPY_1, reason="NumPy 1 has other names")
@pytest.mark.parametrize("name", REFUSED)
def test_who_saves_hears_of_it_once_and_who_restores_reads_what_to_do(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    value, line = REFUSED[name]
    store = MemoryStore()
    with checkpointer(store, {"w": torch.ones(3), "d": {"deep": [value]}}) as ckpt:
        for step in (1, 2, 3):
            ckpt.save_now(step).wait()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert line in record.getMessage() + " "
    assert "restore(weights_only=False)" in record.getMessage()
    weight, kept = torch.zeros(3), {"kept": 1}
    with checkpointer(store, {"w": weight, "d": kept}) as ckpt:
        with pytest.raises(RefusedStateError) as caught:
            ckpt.restore()
        assert isinstance(caught.value, (RestoreError, pickle.UnpicklingError))
        assert not isinstance(caught.value.__cause__, CheckpointError)
        text = str(caught.value)
        assert "restore(weights_only=False)" in text
        assert line.strip() in text or name == "huge integer"
        assert (weight.tolist(), kept) == ([0, 0, 0], {"kept": 1})
        assert ckpt.restore(weights_only=False) == 3
        assert weight.tolist() == [1, 1, 1]
        caplog.clear()
        ckpt.save_now(4).wait()
        assert not caplog.records, "who restores without restriction needs no warning"


def test_it_is_told_at_the_first_save_that_holds_it(caplog: pytest.LogCaptureFixture) -> None:
    best: dict[str, Any] = {"loss": 1.0}
    with checkpointer(MemoryStore(), {"best": best, "w": torch.ones(3)}) as ckpt:
        ckpt.save_now(1).wait()
        best["queue"] = deque([1])
        ckpt.save_now(2).wait()
        best["other"], best["class"] = deque([2]), Foreign()
        ckpt.save_now(3).wait()
        best["number"] = 1 << 4000
        ckpt.save_now(4).wait()
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "collections.deque at best.queue" in first
    assert "Foreign at best.class" in second
    assert "deque" not in second
    assert "an integer of more than 255 bytes at best.number" in third


@pytest.mark.parametrize("value", [1 << 4000, [1 << 4000], {"a": (1.0, 1 << 4000)}, deque([1])])
def test_it_is_told_at_the_first_save_though_it_was_pickled_before(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first step, ahead of the first save."""
    with checkpointer(MemoryStore(), {"d": {"v": value}}) as ckpt:
        ckpt.step(1)
        assert not caplog.records
        ckpt.save_now(2)
        assert "restore() will refuse it" in caplog.text


def test_a_class_that_the_program_allows_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    into: dict[str, Any] = {"d": {}}
    with torch.serialization.safe_globals([Foreign]):
        restored({"d": {"x": Foreign()}}, into)
    assert isinstance(into["d"]["x"], Foreign)
    assert not caplog.records
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]  # type: ignore[attr-defined]
    ):
        restored({"d": {"x": np.arange(3.0), "big": np.zeros(20_000)}}, into)
    assert into["d"]["x"].tolist() == [0, 1, 2]  # type: ignore[attr-defined]
    assert not caplog.records


def test_nothing_is_allowed_for_the_process() -> None:
    before = torch.serialization.get_safe_globals()
    restored({"d": {"v": np.float64(1)}}, {"d": {}})
    assert torch.serialization.get_safe_globals() == before
    file = io.BytesIO()
    fastckpt.save({"v": np.float64(1)}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        fastckpt.load(file, weights_only=True)  # as torch.load does


@pytest.mark.parametrize(
    ("variables", "passed", "is_restricted"),
    [
        ({}, None, True),
        ({}, False, False),
        ({"NO_": "1"}, None, False),
        ({"NO_": "1"}, True, True),
        ({"": "1"}, None, True),
        ({"": "1"}, False, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning")
def test_torchs_variables_count_where_nothing_is_passed(
    variables: dict[str, str], passed: bool | None, is_restricted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, value in variables.items():
        monkeypatch.setenv(f"TORCH_FORCE_{part}WEIGHTS_ONLY_LOAD", value)
    state = {"d": {"x": Foreign()}}
    if not is_restricted:
        restored(state, {"d": {}}, weights_only=passed)
        return
    with pytest.raises(RefusedStateError):
        restored(state, {"d": {}}, weights_only=passed)


# -- streams that nobody's pickler wrote -------------------------------------------------------------------------------


class NoStorages:
    def n_bytes(self, number: int) -> int | None:
        return None

    def has_data(self, number: int) -> bool:
        raise AssertionError

    take = has_data


def load(body: bytes) -> Any:
    stream = b"\x80\x02" + body + b"."
    refused.find(stream, trusted=False)  # raises nothing, whatever it is
    return Rebuild(stream, NoStorages(), "x", None, True, pickle, {"encoding": "utf-8"}, beyond_torch=True).run()  # type: ignore[arg-type]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def dtype(kind: str, state: bytes = b"") -> bytes:
    return b"cnumpy\ndtype\n" + text(kind) + b"\x89\x88\x87R" + state


SCALAR = b"cnumpy._core.multiarray\nscalar\n"
EIGHT = b"c_codecs\nencode\n" + text("12345678") + text("latin1") + b"\x86R"
POINTERS = (
    b"(K\x03" + text("|") + b"N" + text("a") + b"\x85}" + text("a") + dtype("O8") + b"K\x00\x86sK\x08K\x01K\x00tb"
)
HOSTILE: dict[str, bytes] = {
    "bytes that are pointers": SCALAR + dtype("V8", POINTERS) + EIGHT + b"\x86R",
    "a plain dtype that gets fields": SCALAR + dtype("f8", POINTERS) + EIGHT + b"\x86R",
    "objects": SCALAR + dtype("O8") + EIGHT + b"\x86R",
    "too few bytes": SCALAR + dtype("f16") + EIGHT + b"\x86R",
    "too many bytes": SCALAR + dtype("f4") + EIGHT + b"\x86R",
    "no such type": SCALAR + dtype("f7") + EIGHT + b"\x86R",
    "a huge type": SCALAR + dtype("S999999999999") + EIGHT + b"\x86R",
    "no text": SCALAR + dtype("U2") + EIGHT + b"\x86R",
    "no dtype": SCALAR + EIGHT + EIGHT + b"\x86R",
    "a dtype that stays": dtype("f8"),
    "a dtype in a dtype": SCALAR + dtype("f8", dtype("f8") + b"b") + EIGHT + b"\x86R",
    "an array": b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + EIGHT + b"\x87R",
    "much memory": b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R",
    "a factory that is no type": b"ccollections\ndefaultdict\n" + dtype("f8") + b"\x85R",
    "a factory with content": b"ccollections\ndefaultdict\nc__builtin__\nint\n}\x86R",
    "a path of numbers": b"cpathlib\nPosixPath\nK\x05\x85R",
    "a namespace of a number": b"cargparse\nNamespace\nK\x05\x85R",
    "a parameter of text": b"ctorch.nn.parameter\nUninitializedParameter\n" + text("x") + text("y") + b"\x86R",
    "a date of nothing": b"cdatetime\ndatetime\n" + EIGHT + b"\x85R",
    "code": b"cposix\nsystem\n" + text("true") + b"\x85R",
    "eval": b"c__builtin__\neval\n" + text("1") + b"\x85R",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stream_gets_an_error(name: str) -> None:
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        load(HOSTILE[name])


def test_the_streams_of_this_test_are_well_formed() -> None:
    assert load(SCALAR + dtype("f8") + EIGHT + b"\x86R") == np.frombuffer(b"12345678")[0]


# -- looking for it ----------------------------------------------------------------------------------------------------


def test_a_part_that_has_not_changed_is_not_looked_at() -> None:
    state: dict[str, Any] = {"model": {"w": torch.ones(3)}, "best": {"loss": 1.0}}
    recapturer = Recapturer()
    recapturer.capture(state)
    assert {path[0] for path, _ in recapturer.pickled} == {"model", "best"}
    recapturer.capture(state)
    assert recapturer.pickled == []
    state["best"]["loss"] = 2.0
    recapturer.capture(state)
    assert {path[0] for path, _ in recapturer.pickled} == {"best"}


def test_ordinary_streams_are_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[bytes] = []
    find: Callable[..., Any] = refused.find
    monkeypatch.setattr(refused, "find", lambda stream, **how: walked.append(stream) or find(stream, **how))
    state = {
        "model": torch.nn.Linear(3, 3).state_dict(),
        "words": ["scale\nfoo\n", "calc\nfoo.bar\n"],
        "path": pathlib.Path("x"),
        **{f"w{n}": torch.zeros(n) for n in range(300)},
    }
    watch = refused.Watch()
    assert watch.new_in([((), Recapturer().capture(dict(state)).skeleton)], []) == {}
    assert watch.new_in([((), Recapturer().capture(dict(state)).skeleton)], []) == {}
    assert len(walked) == 1, "text that looks like a class is looked into once"
