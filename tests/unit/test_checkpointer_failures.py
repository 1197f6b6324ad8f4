"""A training loop whose saves fail, that ends by an exception or a notice, or restores from what is damaged."""

# ruff: noqa: PT012 - what happens inside of the `with` is what these tests are about

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    PartialRestoreError,
    RepositoryError,
    RestoreError,
    SaveError,
    StoreUnavailableError,
    SupersededError,
    TornSnapshotError,
)
from fastckpt.format import keys
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.spot import Notice
from fastckpt.store.memory import MemoryStore
from tests.support.stores import GivenNotices, HeldStore
from tests.support.training import SHORT_S, Training, checkpointer, living, losses


def test_a_parameter_changed_while_it_is_copied_is_an_error(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastckpt.state import Captured

    training = Training()
    original = Captured.read

    def meddle(self: Captured, pieces: Any, out: Any) -> None:
        if threading.current_thread().name.startswith("fastckpt-stage"):
            with torch.no_grad():
                training.model[0].weight.add_(1)
        original(self, pieces, out)

    with checkpointer(store, training) as ckpt:
        training.step()
        ckpt.step(1)
        ckpt.wait()
        monkeypatch.setattr(Captured, "read", meddle)
        monkeypatch.setattr("fastckpt.snapshot.host_copies._INLINE_BYTES", 1)
        training.step()
        ckpt.step(2)
        with pytest.raises(TornSnapshotError, match="changed while it was copied"):
            ckpt.wait()
        monkeypatch.undo()
        training.step()
        ckpt.step(3)
    assert living(store) == [3, 1]


def test_a_failed_save_reaches_the_next_call_and_harms_nothing(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        training.step()
        ckpt.step(1)
        ckpt.wait()
        store.failing = StoreUnavailableError
        training.step()
        ckpt.step(2)
        with pytest.raises(StoreUnavailableError, match="as the test wants"):
            ckpt.wait()
        store.failing = None
        assert living(store) == [1]
        training.step()
        ckpt.step(3)  # going on is allowed
        ckpt.wait()
        assert living(store) == [3, 1]
        store.failing = StoreUnavailableError
        training.step()
        ckpt.step(4)
        with pytest.raises(StoreUnavailableError):
            ckpt.close()
        ckpt.close()


def test_the_same_step_can_be_tried_again_after_a_failure(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        store.failing = StoreUnavailableError
        with pytest.raises(StoreUnavailableError):
            ckpt.save_now(5).wait(SHORT_S)
        store.failing = None
        with pytest.raises(StoreUnavailableError):  # the failure is reported once by the next call, too
            ckpt.wait()
        commit = ckpt.save_now(5).wait(SHORT_S)
        assert commit.save.attempt == 1
    assert living(store) == [5]


def test_leaving_by_an_exception_saves_nothing_new_and_shows_the_original(store: HeldStore) -> None:
    training = Training()
    with pytest.raises(ZeroDivisionError) as caught, checkpointer(store, training) as ckpt:
        ckpt.step(1)
        ckpt.wait()
        store.failing = StoreUnavailableError
        training.step()
        ckpt.step(2)
        raise ZeroDivisionError
    assert living(store) == [1]
    assert any("as the test wants" in note for note in getattr(caught.value, "__notes__", ["as the test wants"]))


def test_a_save_in_flight_gets_its_time_after_an_exception(store: HeldStore) -> None:
    with pytest.raises(KeyboardInterrupt), checkpointer(store) as ckpt:
        store.open.clear()
        ckpt.step(1)
        assert store.reached.wait(SHORT_S)
        threading.Timer(0.0, store.open.set).start()
        raise KeyboardInterrupt
    assert living(store) == [1]


def test_after_that_time_it_is_given_up(store: HeldStore) -> None:
    with pytest.raises(ValueError, match="mine") as caught, checkpointer(store, close_timeout_s=0.01) as ckpt:
        store.open.clear()
        ckpt.step(1)
        raise ValueError("mine")
    store.open.set()
    assert ckpt._engine.queue.wait_idle(SHORT_S)
    assert living(store) == []
    assert any("given up" in note for note in getattr(caught.value, "__notes__", ["given up"]))


def test_on_exception_save(store: HeldStore) -> None:
    with pytest.raises(ZeroDivisionError), checkpointer(store, every=None, on_exception="save") as ckpt:
        ckpt.step(8)
        raise ZeroDivisionError
    assert living(store) == [8]


def test_restore_is_asked_for_before_the_first_save(store: HeldStore) -> None:
    with checkpointer(store) as ckpt:
        ckpt.save_now(3).wait(SHORT_S)
    with checkpointer(store) as ckpt, pytest.raises(RepositoryError, match="restore"):
        ckpt.save_now(4)
    with checkpointer(store, fresh=True) as ckpt:
        assert ckpt.restore() == 0
        ckpt.save_now(1).wait(SHORT_S)
    assert living(store) == [1]


def test_rewind_and_save_again(store: HeldStore) -> None:
    expected = losses(3)[2]
    training = Training()
    with checkpointer(store, training, keep=None) as ckpt:
        for step in range(1, 6):
            training.step()
            ckpt.step(step)
            ckpt.wait()
        assert ckpt.restore(step=2) == 2
        assert living(store) == [2, 1]  # a rewind holds before anything was saved on it
        assert training.step() == expected
        ckpt.step(3)
        ckpt.wait()
    assert living(store) == [3, 2, 1]
    with checkpointer(store) as ckpt:
        with pytest.raises(NoCheckpointError, match="step 77"):
            ckpt.restore(step=77)
        assert ckpt.restore(step=5) == 5  # the abandoned branch is still there


def test_latest_valid_passes_over_damage_and_records_it(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training, keep=None) as ckpt:
        for step in (1, 2, 3):
            training.step()
            ckpt.step(step)
            ckpt.wait()
    pack = next(info.key for info in store.list("data/000001-000000000003-000/"))
    data = bytearray(store.get(pack))
    data[len(data) // 2] ^= 1
    store.put(pack, data)  # damage that only reading finds
    store.delete(next(info.key for info in store.list("data/000001-000000000002-000/")))  # and some that a LIST finds
    with checkpointer(store) as ckpt:
        with pytest.raises(CorruptCheckpointError, match=r"optimizer.state(.|\n)*restore\(step=1\)"):
            ckpt.restore()
        assert ckpt.restore(step="latest-valid") == 1
        ckpt.save_now(2).wait(SHORT_S)
    newest = Repository(store).newest_epoch()
    epoch = Repository(store).epoch(newest)
    assert [s.checkpoint.step for s in epoch.skipped] == [3, 2]
    assert living(store) == [2, 1]


def test_damage_that_a_list_finds_names_the_newest_complete_step(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training, keep=None) as ckpt:
        for step in (1, 2):
            training.step()
            ckpt.step(step)
            ckpt.wait()
    store.delete(next(info.key for info in store.list("data/000001-000000000002-000/")))
    with checkpointer(store) as ckpt, pytest.raises(CorruptCheckpointError, match=r"restore\(step=1\)"):
        ckpt.restore()


def test_a_state_that_does_not_fit_is_refused_before_anything_is_touched(store: HeldStore) -> None:
    with checkpointer(store) as ckpt:
        ckpt.save_now(1).wait(SHORT_S)
    model = torch.nn.Linear(2, 2)
    with Checkpointer(store, {"model": model, "extra": [1]}, spot=None) as ckpt:
        with pytest.raises(RestoreError, match="'extra' is not in the checkpoint") as caught:
            ckpt.restore()
        assert "'optimizer' of the checkpoint" in str(caught.value)


def test_a_partial_restore_stops_training(store: HeldStore) -> None:
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(2, 2)
    with Checkpointer(store, {"a": a, "b": b}, spot=None) as ckpt:
        ckpt.save_now(1).wait(SHORT_S)

    class Refuses(torch.nn.Linear):
        def load_state_dict(self, *values: Any, **named: Any) -> Any:
            raise ValueError("no")

    with Checkpointer(store, {"a": torch.nn.Linear(3, 3), "b": Refuses(2, 2)}, spot=None) as ckpt:
        with pytest.raises(PartialRestoreError, match="'b' did not take its state"):
            ckpt.restore()
        with pytest.raises(PartialRestoreError):
            ckpt.step(2)
        with pytest.raises(PartialRestoreError):
            ckpt.save_now(2)


def test_a_zombie_is_told(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as zombie:
        zombie.step(1)
        zombie.wait()
        with checkpointer(store) as successor:
            assert successor.restore() == 1
            zombie.step(2)
            with pytest.raises(SupersededError, match="another incarnation"):
                zombie.wait()
            successor.save_now(5).wait(SHORT_S)
    assert living(store) == [5, 1]


def test_a_finished_save_without_commit_is_completed_by_the_next_start(store: HeldStore) -> None:
    class Killed(BaseException):
        pass

    training = Training()
    put_if_absent = store.put_if_absent

    def die(key: str, data: Any) -> None:
        if key.startswith(keys.COMMITS):
            raise Killed
        put_if_absent(key, data)

    ckpt = checkpointer(store, training)
    store.put_if_absent = die  # type: ignore[method-assign]
    ckpt.step(4)
    with pytest.raises(Killed):
        ckpt.close()
    store.put_if_absent = put_if_absent  # type: ignore[method-assign]
    assert living(store) == []
    with checkpointer(store) as ckpt:
        assert ckpt.restore() == 4


def test_a_notice_ends_the_run_with_a_durable_step(store: HeldStore) -> None:
    source = GivenNotices()
    training = Training()
    with checkpointer(store, training, every=None, spot=[source]) as ckpt:
        assert ckpt.restore() == 0
        assert ckpt.exit_code == 0
        training.step()
        assert ckpt.step(1) is False
        source.notices = [Notice("terminate", "test", time.monotonic() + 100, "")]
        deadline = time.monotonic() + SHORT_S
        step = 1
        while not ckpt.step(step + 1):
            step += 1
            training.step()
            assert time.monotonic() < deadline
        assert ckpt.exit_code == fastckpt.EXIT_CODE_NOTICE == 75
        assert ckpt.step(step + 2) is True
    assert living(store) == [step + 1]
    record = Repository(store).commit(next(Catalog(Repository(store)).history()))
    assert record.trigger == "notice"  # type: ignore[union-attr]


def test_a_final_save_has_a_deadline(store: HeldStore) -> None:
    source = GivenNotices()
    ckpt = checkpointer(store, every=None, spot=[source])
    store.open.clear()
    source.notices = [Notice("terminate", "test", time.monotonic() + 0.3, "")]
    deadline = time.monotonic() + SHORT_S
    while ckpt.notice is None:
        assert time.monotonic() < deadline
    with pytest.raises(SaveError, match="not durable when the time was over"):
        ckpt.step(9)
    store.open.set()
    with pytest.raises(CheckpointError):
        ckpt.close()
    assert living(store) == []


def test_previous_signal_handlers_are_back_after_close(store: HeldStore) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with checkpointer(store, spot="signal"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_checkpointer_that_cannot_be_made_leaves_no_store_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Opened(MemoryStore):
        def close(self) -> None:
            closed.append(self.url)

    monkeypatch.setattr("fastckpt.training.engine.open_store", lambda url: Opened())
    with pytest.raises(SaveError, match="nowhere"):
        Checkpointer("memory://x", {"x": torch.ones(1)}, options=Options(spill_dir=str(tmp_path / "nowhere")))
    assert len(closed) == 1
    given = Opened()
    with pytest.raises(SaveError, match="nowhere"):
        Checkpointer(given, {"x": torch.ones(1)}, options=Options(spill_dir=str(tmp_path / "nowhere")))
    assert len(closed) == 1, "a store that was given is its owner's"
