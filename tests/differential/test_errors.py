"""Callers catch torch's exceptions and search for torch's words."""

from __future__ import annotations

import datetime
import inspect
import io
import pickle
import re
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from tests.differential.tools import describe, outcome, same, through_ours, through_torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Custom:
    def __init__(self) -> None:
        self.x = torch.ones(2)


class Blocked:
    def __reduce__(self) -> Any:
        return (inspect.sys.exit, ())  # type: ignore[attr-defined]


def alike(ours: BaseException | None, theirs: BaseException | None, words: bool = True) -> None:
    assert theirs is not None
    assert ours is not None
    assert isinstance(ours, type(theirs)), (ours, theirs)
    if words:
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", ["save", "load"])
def test_signatures(name: str) -> None:
    ours, theirs = inspect.signature(getattr(fastckpt, name)), inspect.signature(getattr(torch, name))
    assert [(p.name, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.kind) for p in theirs.parameters.values()
    ]
    for one, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert one.default == other.default


def test_unpicklable(tmp_path: Path) -> None:
    for bad in (lambda: 0, (n for n in ()), torch.finfo(torch.float32), type("Local", (), {})()):
        state = [torch.ones(2), bad]
        theirs = outcome(lambda state=state: torch.save(state, io.BytesIO()))  # type: ignore[misc]
        for f in (io.BytesIO(), tmp_path / "x"):
            alike(outcome(lambda state=state, f=f: fastckpt.save(state, f)), theirs)  # type: ignore[misc]
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, Any] = {
    "datetime": datetime.datetime(2020, 1, 1),
    "defaultdict": defaultdict(list),
    "custom": Custom(),
    "small array": np.arange(3),
    "large array": np.zeros(100_000),
    "numpy scalar": np.float64(1.0),
    "module": torch.nn.Linear(2, 2),
    "slice": slice(1, 2),
    "frozenset": frozenset([1]),
    "blocked": Blocked(),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_weights_only_refuses(name: str) -> None:
    state = {"t": torch.ones(2), "bad": REFUSED[name]}
    # What torch says of these two it says since 2.7.
    words = TORCH >= (2, 7) or name not in ("large array", "blocked")
    alike(outcome(lambda: through_ours(state)), outcome(lambda: through_torch(state)), words)
    ours, theirs = io.BytesIO(), io.BytesIO()
    fastckpt.save(state, ours)
    torch.save(state, theirs)
    for file in (ours, theirs):
        file.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(theirs)
    theirs.seek(0)
    assert sorted(fastckpt.get_unsafe_globals(ours)) == sorted(names) == sorted(fastckpt.get_unsafe_globals(theirs))


def test_safe_globals() -> None:
    with torch.serialization.safe_globals([Custom]):
        same(Custom())
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Custom])
    try:
        same([Custom()])
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert isinstance(outcome(lambda: through_ours(Custom())), pickle.UnpicklingError)


def test_safe_arrays() -> None:
    from numpy._core.multiarray import _reconstruct

    allowed = [_reconstruct, np.ndarray, np.dtype, type(np.dtype("<f8"))]
    with torch.serialization.safe_globals(allowed):
        same([np.arange(3.0), np.arange(20_000.0)])


def test_partly_safe_arrays() -> None:
    from numpy._core.multiarray import _reconstruct

    for allowed in ([_reconstruct], [_reconstruct, np.ndarray], [_reconstruct, np.ndarray, np.dtype]):
        with torch.serialization.safe_globals(allowed):
            theirs = outcome(lambda: through_torch([np.arange(20_000.0)]))
            alike(outcome(lambda: through_ours([np.arange(20_000.0)])), theirs, words=False)


def test_two_dtypes() -> None:
    x = torch.ones(4)
    for state in ([x, x.view(torch.int32)], [x, x.view(torch.uint16)], [x.untyped_storage(), x]):
        alike(outcome(lambda: through_ours(state)), outcome(lambda: through_torch(state)))  # noqa: B023


@pytest.mark.parametrize("bad", [5, None, b"bytes", 1.5, [], object()])
def test_wrong_target(bad: Any) -> None:
    alike(outcome(lambda: fastckpt.save({}, bad)), outcome(lambda: torch.save({}, bad)))
    alike(outcome(lambda: fastckpt.load(bad)), outcome(lambda: torch.load(bad)))


def test_paths(tmp_path: Path) -> None:
    lost = tmp_path / "no" / "x.pt"
    alike(outcome(lambda: fastckpt.save({}, lost)), outcome(lambda: torch.save({}, lost)))
    alike(outcome(lambda: fastckpt.save({}, tmp_path)), outcome(lambda: torch.save({}, tmp_path)), words=False)
    for missing in (lost, str(lost)):
        alike(outcome(lambda: fastckpt.load(missing)), outcome(lambda: torch.load(missing)))  # noqa: B023
    for directory in (tmp_path, str(tmp_path)):
        ours, theirs = outcome(lambda: fastckpt.load(directory)), outcome(lambda: torch.load(directory))  # noqa: B023
        alike(ours, theirs, words=False)
        assert str(ours).startswith("[Errno 21] Is a directory")  # and then what was expected: it may be a repository


def test_relative_missing_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alike(outcome(lambda: fastckpt.save({}, "no/x")), outcome(lambda: torch.save({}, "no/x")))


def test_empty_file() -> None:
    alike(outcome(lambda: fastckpt.load(io.BytesIO())), outcome(lambda: torch.load(io.BytesIO())), words=False)


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("seek")

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


def test_not_seekable() -> None:
    file = io.BytesIO()
    fastckpt.save({}, file)
    alike(outcome(lambda: fastckpt.load(Pipe(file.getvalue()))), outcome(lambda: torch.load(Pipe(file.getvalue()))))


LOAD_ARGUMENTS: list[Any] = [
    {"pickle_module": pickle, "weights_only": True},
    {"map_location": "bogus"},
    {"map_location": 3},
    {"map_location": b"cpu"},
    {"map_location": "cpu:0"},
    {"map_location": {"cpu": "bogus"}},
    {"map_location": lambda storage, location: 1 / 0},
    {"mmap": True},
]


@pytest.mark.parametrize(
    "arguments", LOAD_ARGUMENTS, ids=[re.sub(" at 0x[^>]*", "", repr(arguments)) for arguments in LOAD_ARGUMENTS]
)
def test_load_arguments(arguments: dict[str, Any]) -> None:
    state = {"x": torch.ones(3)}
    alike(outcome(lambda: through_ours(state, **arguments)), outcome(lambda: through_torch(state, **arguments)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("location", ["cuda", "cuda:1", torch.device("cuda"), {"cpu": "cuda:0"}])
def test_no_cuda(location: Any) -> None:
    state = [torch.ones(3)]
    theirs = outcome(lambda: through_torch(state, map_location=location))
    alike(outcome(lambda: through_ours(state, map_location=location)), theirs)


ENVIRONMENTS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}, {"weights_only": False}),
    ({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "yes"}, {"pickle_module": pickle}),
    ({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "y", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, {}),
    ({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, {"weights_only": True}),
    ({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "no"}, {}),
]


@pytest.mark.parametrize(("environment", "arguments"), ENVIRONMENTS)
def test_environment(environment: dict[str, str], arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state = [datetime.date(2020, 1, 1)]
    alike(outcome(lambda: through_ours(state, **arguments)), outcome(lambda: through_torch(state, **arguments)))


def test_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "true")
    with pytest.warns(UserWarning, match=r"(?i)weights_only") as theirs:
        expected = through_torch([datetime.date(2020, 1, 1)])
    with pytest.warns(UserWarning, match=r"(?i)weights_only") as ours:
        assert describe(through_ours([datetime.date(2020, 1, 1)])) == describe(expected)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]


@pytest.mark.skipif(TORCH < (2, 7), reason="torch warns of it since 2.7")
def test_unused_arguments_warn() -> None:
    state = OrderedDict(x=torch.ones(1))
    with pytest.warns(UserWarning, match=r"(?i)weights_only") as theirs:
        through_torch(state, encoding="latin1")
    with pytest.warns(UserWarning, match=r"(?i)weights_only") as ours:
        through_ours(state, encoding="latin1")
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
