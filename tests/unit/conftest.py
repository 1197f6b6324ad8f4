import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastckpt.host import files
from fastckpt.snapshot import pool
from fastckpt.writing import object_sink, sinks, turns
from tests.support.stores import HeldStore
from tests.support.targets import Gate

_waited_for: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@pytest.fixture(autouse=True)
def saves_end_with_their_test() -> Iterator[None]:
    """What a save that was given up says at its end would stand in the log of the next test. Those that hang are waited for once."""
    yield
    for thread in threading.enumerate():
        if thread.name == "fastckpt-checkpointer" and thread not in _waited_for:
            _waited_for.add(thread)
            thread.join(5)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the slabs of ordinary memory that are made."""
    sizes: list[int] = []
    fresh = pool.fresh_pages  # type: ignore[attr-defined]

    def counted(n_bytes: int) -> Any:
        sizes.append(n_bytes)
        return fresh(n_bytes)

    monkeypatch.setattr(pool, "fresh_pages", counted)
    return sizes


@pytest.fixture
def store() -> Iterator[HeldStore]:
    """Open, until the test holds it."""
    held = HeldStore()
    yield held
    held.open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The first save to a path, object or file object stops just before its last step."""
    gate = Gate()
    for owner in (files.AtomicFile, sinks.DirectFile, sinks.FileObject, object_sink.ObjectSink):

        def commit(self: Any, real: Callable[[Any], None] = owner.commit) -> None:
            gate.wait()
            real(self)

        monkeypatch.setattr(owner, "commit", commit)
    yield gate
    gate.open.set()
    assert not turns._turns, "a save has ended and left its turn"
