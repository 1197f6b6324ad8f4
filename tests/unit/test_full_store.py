"""A store that is full: what a failed save wrote goes at once, or it would take the room that the next one needs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import StoreAccessError, StoreFullError
from fastckpt.format import keys
from fastckpt.host.files import AtomicFile
from fastckpt.store.cloud_errors import Answer, translate
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import check_all, history

SMALL = fastckpt.Options(threads=1, connections=2, compress=False, host_budget_bytes=48 << 20)
STATE_BYTES = 20 << 20


class SmallDisk(MemoryStore):
    """Refuses what would make it hold more than `room_bytes`."""

    room_bytes = 1 << 40

    def held_bytes(self) -> int:
        return sum(info.n_bytes for info in self.list(keys.DATA))

    def put(self, key: str, data: Any) -> None:
        if key.startswith(keys.DATA) and self.held_bytes() + memoryview(data).nbytes > self.room_bytes:
            raise StoreFullError(f"no room for {key}, as the test wants it")
        super().put(key, data)


def test_a_save_that_does_not_fit_leaves_nothing_behind() -> None:
    store = SmallDisk()
    state = {"w": torch.randint(0, 255, (STATE_BYTES,), dtype=torch.uint8)}
    with fastckpt.Checkpointer(store, state, every=None, keep=None, spot=None, options=SMALL) as ckpt:
        ckpt.save_now(1).wait()
        before = {info.key for info in store.list(keys.DATA)}
        assert len(before) > 2, "a save is several packs"
        store.room_bytes = store.held_bytes() + STATE_BYTES // 2
        for step in (2, 3, 4):
            state["w"].random_(0, 255)  # otherwise a save would name what is there
            with pytest.raises(StoreFullError, match="no room"):
                ckpt.save_now(step).wait()
            with pytest.raises(StoreFullError):
                ckpt.step(step)
            assert {info.key for info in store.list(keys.DATA)} == before
        assert [found.step for found in history(store)] == [1]
        check_all(store)
        store.room_bytes += STATE_BYTES // 2 + (
            1 << 20
        )  # exactly one more fits: nothing of the failed ones may be there
        ckpt.save_now(5).wait()
    assert [found.step for found in history(store)] == [5, 1]
    check_all(store)


def test_what_cannot_be_deleted_is_told_and_the_error_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Sealed(SmallDisk):
        def delete(self, key: str) -> None:
            if key.startswith(keys.DATA):
                raise StoreAccessError("no deleting, as the test wants it")
            super().delete(key)

    store = Sealed()
    store.room_bytes = STATE_BYTES // 2
    state = {"w": torch.randint(0, 255, (STATE_BYTES,), dtype=torch.uint8)}
    with fastckpt.Checkpointer(store, state, every=None, keep=None, spot=None, options=SMALL) as ckpt:
        with pytest.raises(StoreFullError):
            ckpt.save_now(1).wait()
        with pytest.raises(StoreFullError):
            ckpt.step(1)
    assert sum("what is left of the failed save of step 1 stays" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_directory_on_a_full_disk_says_so(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: AtomicFile, data: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(AtomicFile, "write", full)
    with pytest.raises(StoreFullError, match="grace_s") as caught:
        LocalStore(tmp_path).put("data/x", b"1")
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(tmp_path.rglob("*x*"))


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "QuotaExceeded"), (507, "XMinioStorageFull"), (400, "XMinioAdminBucketQuotaExceeded"), (507, "")],
)
def test_a_quota_of_s3_is_a_full_store(status: int, code: str) -> None:
    found = translate(Answer(status=status, code=code), "put", "s3://b/k", [], "")
    assert type(found) is StoreFullError
    assert code in str(found)
    assert "raise the quota" in str(found)
