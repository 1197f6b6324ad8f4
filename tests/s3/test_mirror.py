"""Mirror, cp and prefetch against a real server: between buckets, to a disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastckpt
from fastckpt import cli
from fastckpt.format import keys
from fastckpt.store.local import LocalStore
from fastckpt.store.open import open_store
from tests.s3server import S3Server
from tests.support.command_line import run, run_json
from tests.support.repositories import history, keys_of, save_steps
from tests.support.states import small_state

pytestmark = pytest.mark.s3


@pytest.fixture
def url(aws: pytest.MonkeyPatch, bucket: str) -> str:
    return f"s3://{bucket}/run"


def test_between_buckets_and_back_to_a_disk(
    url: str, s3_server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, disk = f"s3://{s3_server.new_bucket()}/deep/er", str(tmp_path / "disk")
    with open_store(url) as source, open_store(other) as target:
        save_steps(source, [1, 2])
        assert run(capsys, "mirror", url, other)[0] == cli.OK
        assert history(target) == history(source)
        status, value = run_json(capsys, "mirror", url, other)
        assert (status, value["sent_objects"], len(value["present"])) == (cli.OK, 0, 2)
        assert not keys_of(source, keys.PINS)
        packs = {key: target.get(key) for key in keys_of(target, keys.DATA)}
    assert run(capsys, "check", other)[0] == cli.OK
    assert run(capsys, "cp", other, disk)[0] == cli.OK
    assert run(capsys, "check", disk)[0] == cli.OK
    here = LocalStore(disk)
    assert {key: here.get(key) for key in keys_of(here, keys.DATA)}.items() <= packs.items()


def test_a_prefetched_folder_is_read_instead_of_the_bucket(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    state = {"model": small_state(1), "step": [1]}
    with fastckpt.Checkpointer(url, state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    assert run_json(capsys, "prefetch", url, "--to", str(folder))[1]["fetched_bytes"] > 0
    with open_store(url) as store:
        for key in keys_of(store, keys.DATA):
            store.put(key, bytes(store.head(key).n_bytes))
    monkeypatch.setenv("FASTCKPT_CACHE_DIR", str(folder))
    state["step"][0] = 0
    with fastckpt.Checkpointer(url, state, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1
    assert state["step"] == [1]


def test_cp_of_a_file_to_an_object_and_back(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, back = tmp_path / "a.fckpt", tmp_path / "b.fckpt"
    fastckpt.save(small_state(1), source)
    assert run(capsys, "cp", str(source), f"{url}/model.fckpt")[0] == cli.OK
    assert run(capsys, "cp", str(source), f"{url}/model.fckpt")[0] == cli.USAGE
    assert run(capsys, "cp", f"{url}/model.fckpt", str(back))[0] == cli.OK
    assert back.read_bytes() == source.read_bytes()
