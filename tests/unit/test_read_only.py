"""Evaluation and inference beside a training job: reading disturbs nobody, and neither does a restore that is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import (
    NoCheckpointError,
    RepositoryError,
    RestoreError,
    RetiredError,
    SaveError,
    StoreAccessError,
    SupersededError,
)
from fastckpt.format.keys import CheckpointId
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep, plan_retention
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.training.checkpointer import Checkpointer
from tests.support.repositories import incarnation
from tests.support.states import sealed

SHORT_S = 60.0


class ReadOnlyStore(Wrapper):
    """Refuses every write, as a policy of readers does. `before`: called before each operation."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.before: Callable[[str, str], None] = lambda verb, key: None
        self.writes: list[str] = []

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        if verb not in ("get", "get_into", "head", "list"):
            self.writes.append(f"{verb} {key}")
            raise StoreAccessError(f"{verb} {key}: AccessDenied")
        self.before(verb, key)
        return operation()


def model(value: float) -> torch.nn.Linear:
    made = torch.nn.Linear(3, 3)
    torch.nn.init.constant_(made.weight, value)
    return made


def trained(store: Store, steps: int = 2, net: torch.nn.Linear | None = None) -> Checkpointer:
    """A training job under way; the weights of each step are its number. net: what is trained."""
    net = net or model(0.0)
    job = Checkpointer(store, {"model": net}, every=None, spot=None, keep=None)
    job.restore()
    for step in range(1, steps + 1):
        torch.nn.init.constant_(net.weight, step)
        job.save_now(step).wait(SHORT_S)
    return job


def test_reading_writes_nothing_and_ends_nobody() -> None:
    store = MemoryStore()
    job = trained(store)
    reading = ReadOnlyStore(store)
    for step, expected in (("latest", 2), ("latest-valid", 2), (1, 1)):
        net = model(-1.0)
        with Checkpointer(reading, {"model": net}, read_only=True) as evaluation:
            assert evaluation.restore(step) == expected  # type: ignore[arg-type]
            assert net.weight.eq(expected).all()
            with pytest.raises(SaveError, match="read_only"):
                evaluation.step(9)
            with pytest.raises(SaveError, match="read_only"):
                evaluation.save_now(9)
    assert reading.writes == []
    job.save_now(3).wait(SHORT_S)
    job.close()


def test_a_reader_may_look_again_and_again() -> None:
    store = MemoryStore()
    job = trained(store)
    with Checkpointer(ReadOnlyStore(store), {"model": model(0.0)}, read_only=True) as evaluation:
        assert evaluation.restore() == 2
        job.save_now(5).wait(SHORT_S)
        assert evaluation.restore() == 5
    job.close()


def test_a_pending_commit_is_not_there_yet() -> None:
    store = MemoryStore()
    trained(store, 2).close()
    store.delete("commits/000001-000000000002.json")
    with Checkpointer(ReadOnlyStore(store), {"model": model(0.0)}, read_only=True) as evaluation:
        assert evaluation.restore() == 1


def retire_all_but_the_newest(store: MemoryStore) -> None:
    collector = Collector(Repository(store))
    for _ in range(2):
        collector.run(plan_retention(collector.look(), Keep(last=1), (), 0.0), None)


@pytest.mark.parametrize("moment", ["votes", "data", "gone"])
def test_who_wants_the_newest_gets_what_is_newest_when_it_was_retired_meanwhile(moment: str) -> None:
    store = MemoryStore()
    net = model(0.0)
    job = trained(store, 1, net)
    reading = ReadOnlyStore(store)
    done: list[bool] = []

    def meanwhile(verb: str, key: str) -> None:
        wanted = ("get", "votes/") if moment == "votes" else ("get_into", "data/")
        if not done and verb == wanted[0] and key.startswith(wanted[1]):
            done.append(True)
            torch.nn.init.constant_(net.weight, 2)
            torch.nn.init.constant_(net.bias, 2)  # nothing of step 1 is needed any more
            job.save_now(2).wait(SHORT_S)
            retire_all_but_the_newest(store)
            if moment == "gone":
                store.delete("commits/000001-000000000001.json")

    reading.before = meanwhile
    with Checkpointer(reading, {"model": model(0.0)}, read_only=True) as evaluation:
        assert evaluation.restore() == 2
    assert done
    job.close()


def test_who_named_a_step_is_told_that_it_was_retired() -> None:
    store = MemoryStore()
    trained(store, 2).close()
    reading = ReadOnlyStore(store)
    reading.before = lambda verb, key: retire_all_but_the_newest(store) if key.startswith("data/") else None
    with (
        Checkpointer(reading, {"model": model(0.0)}, read_only=True) as evaluation,
        pytest.raises(RetiredError, match="retired"),
    ):
        evaluation.restore(1)


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(RepositoryError, match="no fastckpt repository"):
        Checkpointer(ReadOnlyStore(MemoryStore()), {"model": model(0.0)}, read_only=True)
    store = MemoryStore()
    Repository(store).initialise()
    with (
        Checkpointer(ReadOnlyStore(store), {"model": model(0.0)}, read_only=True) as evaluation,
        pytest.raises(NoCheckpointError, match="nothing to read"),
    ):
        evaluation.restore()
    with pytest.raises(ValueError, match="exclude each other"):
        Checkpointer(store, {"model": model(0.0)}, read_only=True, fresh=True)


class Other(torch.nn.Module):
    """Of other names and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 3))
        self.more = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"model": torch.nn.Linear(4, 4)},
            r"model.weight is \[4, 4\] here and \[3, 3\] in the checkpoint\n  model.bias",
        ),
        ({"model": Other()}, r"model.more is not in the checkpoint\n  model.bias of the checkpoint has no place"),
        ({"model": torch.nn.Linear(3, 3), "extra": torch.zeros(1)}, "'extra' is not in the checkpoint"),
    ],
)
def test_a_restore_that_is_refused_claims_and_changes_nothing(state: dict[str, Any], words: str) -> None:
    store = MemoryStore()
    job = trained(store)
    before = {name: [t.clone() for t in target.parameters()] for name, target in state.items() if name == "model"}
    with Checkpointer(store, state, spot=None) as other, pytest.raises(RestoreError, match=words):
        other.restore()
    assert Repository(store).newest_epoch() == 1
    assert all(torch.equal(a, b) for a, b in zip(before["model"], state["model"].parameters(), strict=True))
    job.save_now(3).wait(SHORT_S)
    job.close()


def test_a_damaged_checkpoint_is_found_before_the_claim() -> None:
    store = MemoryStore()
    job = trained(store)
    for info in store.list("data/000001-000000000002-000/"):
        store.put(info.key, bytes(info.n_bytes))
    with Checkpointer(store, {"model": model(0.0)}, spot=None) as other:
        with pytest.raises(RuntimeError, match="damaged"):
            other.restore()
        assert Repository(store).newest_epoch() == 1
        assert other.restore("latest-valid") == 1
    with pytest.raises(SupersededError, match="read_only=True"):
        job.save_now(3).wait(SHORT_S)
    with pytest.raises(SupersededError):
        job.close()


@pytest.mark.parametrize("moves", [1, 2, 5])
def test_a_head_that_moves_while_it_loads_is_loaded_again(moves: int) -> None:
    store = MemoryStore()
    trained(store, 1).close()
    # Another incarnation, whose saves are not acknowledged any more once ours has claimed: the head moves all the same.
    other = incarnation(store)
    other.choose_and_claim()
    net, left = model(0.0), [moves]
    state = {"model": torch.nn.Linear(3, 3).state_dict()}

    class Moving(Wrapper):
        def get_into(self, key: str, offset: int, out: Any) -> None:
            if left[0]:
                left[0] -= 1
                step = 10 - left[0]
                torch.nn.init.constant_(state["model"]["weight"], step)
                with contextlib.suppress(SupersededError):
                    other.save(sealed(state), step)
            super().get_into(key, offset, out)

    with Checkpointer(Moving(store), {"model": net}, spot=None) as ckpt:
        assert ckpt.restore() >= 7  # after two rounds it claims first
        assert net.weight.eq(ckpt.restored.save.step).all()  # type: ignore[union-attr]
        ckpt.save_now(20).wait(SHORT_S)
    commit = Repository(store).commit(CheckpointId(Repository(store).newest_epoch(), 20))
    assert commit.parent is not None  # type: ignore[union-attr]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """memory://readers/run, whose every write is refused once it is opened by its URL."""
    store = MemoryStore(name="readers")

    def open_url(url: str) -> Store:
        rest = url.removeprefix("memory://readers").strip("/")
        return ReadOnlyStore(_Below(store, f"{rest}/" if rest else ""))

    for module in ("fastckpt.repository.locate", "fastckpt.store.open"):
        monkeypatch.setattr(f"{module}.open_store", open_url)
    return store


class _Below(Wrapper):
    """A store under a prefix of another."""

    def __init__(self, inner: Store, prefix: str) -> None:
        super().__init__(inner)
        self._prefix = prefix

    def put(self, key: str, data: Any) -> None:
        self.inner.put(self._prefix + key, data)

    def put_if_absent(self, key: str, data: Any) -> None:
        self.inner.put_if_absent(self._prefix + key, data)

    def get(self, key: str) -> bytes:
        return self.inner.get(self._prefix + key)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self.inner.get_into(self._prefix + key, offset, out)

    def head(self, key: str) -> ObjectInfo:
        return replace(self.inner.head(self._prefix + key), key=key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        n = len(self._prefix)
        return (replace(info, key=info.key[n:]) for info in self.inner.list(self._prefix + prefix))

    def delete(self, key: str) -> None:
        self.inner.delete(self._prefix + key)


URL = "memory://readers/run"


def test_load_and_open_read_a_repository_by_its_url(named: MemoryStore) -> None:
    job = trained(_Below(named, "run/"))
    assert fastckpt.load(URL)["model"]["weight"].eq(2).all()
    for step, expected in ((None, 2), (1, 1)):
        with fastckpt.open(URL, step=step) as reader:
            assert reader["model.weight"].eq(expected).all()
    with pytest.raises(NoCheckpointError, match="no checkpoint of step 7"):
        fastckpt.open(URL, step=7)
    job.save_now(3).wait(SHORT_S)
    with fastckpt.open(URL, step=3):
        job.close()


def test_an_object_of_the_same_name_wins(named: MemoryStore, tmp_path: Path) -> None:
    trained(_Below(named, "run/")).close()
    fastckpt.save({"a": 1}, tmp_path / "x")
    named.put("run", (tmp_path / "x").read_bytes())
    assert fastckpt.load(URL) == {"a": 1}
    with fastckpt.open(URL, step=2) as reader:
        assert reader["model.weight"].eq(2).all()


def test_a_directory_is_read_too_and_a_file_has_no_steps(tmp_path: Path) -> None:
    trained(LocalStore(tmp_path / "run")).close()
    assert fastckpt.load(tmp_path / "run")["model"]["weight"].eq(2).all()
    with fastckpt.open(tmp_path / "run", step=1) as reader:
        assert reader["model.weight"].eq(1).all()
    fastckpt.save({"a": 1}, tmp_path / "x")
    with pytest.raises(fastckpt.NotACheckpointError, match="no repository"):
        fastckpt.open(tmp_path / "x", step=1)
    with pytest.raises(IsADirectoryError):
        fastckpt.load(tmp_path)
