"""`fastckpt prefetch` and reading through its folder: what comes from where, and that the folder is never trusted."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastckpt
from fastckpt import Checkpointer, cli
from fastckpt.errors import NoCheckpointError, RepositoryError
from fastckpt.format import keys
from fastckpt.format.keys import SaveId, VoteName
from fastckpt.options import Options
from fastckpt.repository import cache_names
from fastckpt.repository.cache_folder import CacheFolder
from fastckpt.repository.cached_store import CachedStore, _Cache, cached
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.upkeep.prefetch import prefetch
from tests.support import dcp
from tests.support.command_line import run, run_json
from tests.support.repositories import (
    IN_PARALLEL,
    commit_of,
    incarnation,
    keys_of,
    read,
    save_ranks,
    save_shared,
    shared,
)
from tests.support.states import same, sealed, small_state

LARGE = 3 << 20


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"model": {"w": torch.randn(LARGE)}, "step": torch.tensor(step)}


def saved(store: Store, *steps: int) -> Store:
    job = incarnation(store)
    job.choose_and_claim()
    for step in steps:
        job.save(sealed(state(step)), step)
    return store


def repository_id(store: Store) -> str:
    marker = Repository(store).marker()
    assert marker is not None
    return marker.repository


def files_of(folder: Path) -> dict[str, Path]:
    """Of one repository, by key."""
    (own,) = folder.iterdir()
    return {str(path.relative_to(own)): path for path in own.rglob("*") if not path.is_dir()}


def reads(watched: FaultyStore) -> list[str]:
    return [key for verb, key in watched.operations if verb in ("get", "get_into", "head")]


def restored(store: Store, folder: Path) -> tuple[dict[str, Any], FaultyStore]:
    """What a restore through the folder gives, and what it asked the store."""
    watched = FaultyStore(store)
    mine = {"model": {"w": torch.zeros(LARGE)}, "step": torch.tensor(0)}
    with Checkpointer(watched, mine, every=None, spot=None, options=Options(cache_dir=str(folder))) as ckpt:
        ckpt.restore()
    return mine, watched


def test_a_restore_reads_packs_and_votes_there_and_all_else_from_the_store(tmp_path: Path) -> None:
    store, folder = saved(MemoryStore(), 1, 2), tmp_path / "cache"
    report = prefetch(store, str(folder), options=IN_PARALLEL)
    found = files_of(folder)
    assert report.checkpoint == (1, 2)
    assert (
        report.fetched_bytes == sum(p.stat().st_size for key, p in found.items() if key.startswith(keys.DATA)) > 1 << 20
    )
    assert sorted(found) == sorted(
        keys_of(store, "data/000001-000000000002-000/") + keys_of(store, "votes/000001-000000000002-000/")
    )
    mine, watched = restored(store, folder)
    assert same(mine, state(2))
    asked = reads(watched)
    assert not [key for key in asked if key.startswith((keys.DATA, keys.VOTES))]
    assert keys.MARKER in asked
    assert [key for key in asked if key.startswith(keys.COMMITS)]
    again = prefetch(store, str(folder), options=IN_PARALLEL)
    assert (again.fetched_bytes, again.present_bytes) == (0, report.fetched_bytes)


def test_modes_are_for_this_user_alone(tmp_path: Path) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "a" / "cache"
    before = os.umask(0)
    try:
        prefetch(store, str(folder), options=IN_PARALLEL)
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def spoil_nothing(path: Path) -> None:
    pass


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    moved = path.with_name(".elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


def link_to_endless_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def linked_folder(path: Path) -> None:
    moved = path.parent.with_name("elsewhere")
    if not moved.exists() and not path.parent.is_symlink():
        path.parent.rename(moved)
        path.parent.symlink_to(moved)


def gone(path: Path) -> None:
    path.unlink()


SPOILERS = [spoil_nothing, flip, cut, zero, pipe, link, link_to_endless_zeros, linked_folder, gone]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [keys.DATA, keys.VOTES])
def test_what_is_damaged_or_foreign_there_is_read_from_the_store(
    kind: str, spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    prefetch(store, str(folder), options=IN_PARALLEL)
    spoilt = [key for key in files_of(folder) if key.startswith(kind)]
    for path in [files_of(folder)[key] for key in spoilt]:
        spoil(path)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        mine, watched = restored(store, folder)
    assert same(mine, state(1))
    if spoil is not spoil_nothing:
        assert {key for key in reads(watched) if key.startswith(kind)} == set(spoilt)
    if spoil in (flip, zero):
        assert len(caplog.records) == len(spoilt)
        assert "is damaged, or of something else" in caplog.text
        assert prefetch(store, str(folder), options=IN_PARALLEL).fetched_bytes >= (kind == keys.DATA)
        assert not [key for key in reads(restored(store, folder)[1]) if key.startswith(kind)]


@pytest.mark.parametrize("has_files", [False, True])
@pytest.mark.parametrize("step", ["latest", "latest-valid"])
def test_a_pack_that_changes_after_it_was_verified_is_read_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_files: bool, step: Any
) -> None:
    store = saved(LocalStore(tmp_path / "store") if has_files else MemoryStore(), 1, 2)
    folder, verified = tmp_path / "cache", _Cache._verified
    prefetch(store, str(folder), options=IN_PARALLEL)

    def changed_after(self: _Cache, cache: CacheFolder, file: Any) -> bool:
        found = verified(self, cache, file)
        path = files_of(folder)[file.key]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return found

    monkeypatch.setattr(_Cache, "_verified", changed_after)
    mine: dict[str, Any] = {"model": {"w": torch.zeros(LARGE)}, "step": torch.tensor(0)}
    with Checkpointer(store, mine, every=None, spot=None, options=Options(cache_dir=str(folder))) as ckpt:
        assert ckpt.restore(step) == 2
    assert same(mine, state(2))
    assert "in the cache" in caplog.text
    assert not [key for key in files_of(folder) if key.startswith(keys.DATA)]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_is_there_the_restore_is_right(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store, folder = MemoryStore(), tmp_path_factory.mktemp("x") / "cache"
    Repository(store).initialise()
    Repository(store).claim(None, world=3)
    save_ranks(store, 1, 1, [small_state(rank) for rank in range(3)])
    prefetch(store, str(folder), options=IN_PARALLEL)
    for path in sorted(files_of(folder).values()):
        spoil = data.draw(st.sampled_from([f for f in SPOILERS if f is not linked_folder]))
        spoil(path)
    through = cached(store, str(folder))
    commit = commit_of(through, 1)
    for rank in range(3):
        assert same(read(through, commit, rank), small_state(rank))


def test_a_folder_that_vouches_for_itself_is_not_believed(tmp_path: Path) -> None:
    """A vote and packs that fit each other, of another run under the same id: the commit record of the store names other ones."""
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    other = saved(MemoryStore(), 5)
    prefetch(other, str(folder), options=IN_PARALLEL)
    (own,) = folder.iterdir()
    own.rename(folder / repository_id(store))
    for path in (folder / repository_id(store)).rglob("*000000000005*"):
        path.rename(path.with_name(path.name.replace("000000000005", "000000000001")))
    mine, _ = restored(store, folder)
    assert same(mine, state(1))


def test_files_may_appear_while_a_restore_reads(tmp_path: Path) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    arrived = False

    def arrive(number: int, verb: str, key: str, when: str) -> None:
        nonlocal arrived
        if not arrived and key.startswith(keys.VOTES):
            arrived = True
            prefetch(store, str(folder), options=IN_PARALLEL)

    through = cached(FaultyStore(store, hook=arrive), str(folder))
    assert same(read(through, commit_of(through, 1)), state(1))
    assert not [key for key in reads(through.inner) if key.startswith(keys.DATA)]  # type: ignore[attr-defined]


def test_votes_that_another_rank_has_read_are_learned_from_the_folder(tmp_path: Path) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    prefetch(store, str(folder), options=IN_PARALLEL)
    watched = FaultyStore(store)
    through = CachedStore(watched, str(folder))
    commit_of(through, 1)
    (pack, *_) = keys_of(store, keys.DATA)
    out = bytearray(16)
    through.get_into(pack, 8, out)
    assert out == store.get(pack)[8:24]
    assert pack not in reads(watched)
    (vote,) = keys_of(store, keys.VOTES)
    through.get_into(vote, 4, out)
    assert out == store.get(vote)[4:20]
    assert through.head(vote).n_bytes == len(store.get(vote))
    assert vote not in reads(watched)


def test_without_a_commit_record_from_the_store_no_pack_is_believed(tmp_path: Path) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    prefetch(store, str(folder), options=IN_PARALLEL)
    watched = FaultyStore(store)
    (pack, *_) = keys_of(store, keys.DATA)
    CachedStore(watched, str(folder)).get_into(pack, 0, bytearray(4))
    assert pack in reads(watched)


def test_load_and_open_read_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = tmp_path / "run", tmp_path / "cache"
    store = saved(LocalStore(url), 1)
    monkeypatch.setenv("FASTCKPT_CACHE_DIR", str(folder))
    prefetch(store, str(folder), options=IN_PARALLEL)
    for key in keys_of(store, keys.DATA):
        store.put(key, bytes(store.head(key).n_bytes))  # whoever reads it here finds damage
    assert same(fastckpt.load(url), state(1))
    with fastckpt.open(url) as tensors:
        assert torch.equal(tensors["model.w"], state(1)["model"]["w"])


@pytest.mark.filterwarnings(dcp.IGNORED)
def test_a_load_of_dcp_reads_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = tmp_path / "run", tmp_path / "cache"
    dcp.save(url, {"w": state(1)["model"]["w"]})
    store = LocalStore(url)
    prefetch(store, str(folder), options=IN_PARALLEL)
    for key in keys_of(store, keys.DATA):
        store.put(key, bytes(store.head(key).n_bytes))
    monkeypatch.setenv("FASTCKPT_CACHE_DIR", str(folder))
    assert same(dcp.load(url, {"w": torch.zeros(LARGE)}), {"w": state(1)["model"]["w"]})


def test_other_repositories_are_ignored_and_removed_when_nobody_uses_them(tmp_path: Path) -> None:
    old, new, folder = saved(MemoryStore(), 1), saved(MemoryStore(), 1), tmp_path / "cache"
    prefetch(old, str(folder), options=IN_PARALLEL)
    prefetch(new, str(folder), options=IN_PARALLEL)
    assert {path.name for path in folder.iterdir()} == {repository_id(old), repository_id(new)}
    os.utime(folder / repository_id(old), (0, 0))
    (folder / "notes").mkdir()
    os.utime(folder / "notes", (0, 0))
    prefetch(new, str(folder), options=IN_PARALLEL)
    assert {path.name for path in folder.iterdir()} == {"notes", repository_id(new)}


def test_only_the_chosen_checkpoint_stays(tmp_path: Path) -> None:
    store, folder = saved(MemoryStore(), 1, 2), tmp_path / "cache"
    prefetch(store, str(folder), step=1, options=IN_PARALLEL)
    (own,) = folder.iterdir()
    half, older = own / ".0123.tmp", own / ".4567.tmp"
    for path in (half, older):
        path.write_bytes(b"of a prefetch that was killed")
    os.utime(older, (0, 0))
    prefetch(store, str(folder), options=IN_PARALLEL)
    assert not [key for key in files_of(folder) if "000000000001" in key]
    assert half.exists()
    assert not older.exists()


def test_no_more_than_asked_for_the_first_packs_of_all_ranks_first(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "cache"
    Repository(store).initialise()
    Repository(store).claim(None, world=2)
    save_ranks(store, 1, 1, [state(rank) for rank in range(2)])
    packs = {info.key: info.n_bytes for info in store.list(keys.DATA)}
    firsts = [key for key in packs if key.endswith("000000.pack")]
    assert len(firsts) == 2
    most = sum(packs[key] for key in firsts)
    report = prefetch(store, str(folder), most_bytes=most, options=IN_PARALLEL)
    assert {key for key in files_of(folder) if key.startswith(keys.DATA)} == set(firsts)
    assert (report.fetched_bytes, report.left_bytes) == (most, sum(packs.values()) - most)
    through = cached(store, str(folder))
    assert same(read(through, commit_of(through, 1), 1), state(1))


def test_some_ranks_and_what_others_write_for_them(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "cache"
    Repository(store).initialise()
    Repository(store).claim(None, world=3)
    half = 8 << 20
    states: list[Any] = [{"own": torch.full((10,), float(rank)), "all": torch.arange(half / 2)} for rank in (0, 1)]
    shares = {"all": [(0, half), (1, half)]}
    made = [shared(one, rank, shares) for rank, one in enumerate(states)]
    made.append(shared({"own": torch.zeros(5)}, 2, {}))
    commit = save_shared(store, 1, 1, made)
    prefetch(store, str(folder), ranks=[1], options=IN_PARALLEL)
    assert not [key for key in files_of(folder) if "/r00002" in key]
    watched = FaultyStore(store)
    through = cached(watched, str(folder))
    assert same(read(through, commit_of(through, 1), 1), states[1])
    assert not [key for key in reads(watched) if key.startswith((keys.DATA, keys.VOTES))]
    assert same(read(through, commit, 2), {"own": torch.zeros(5)})
    with pytest.raises(NoCheckpointError, match="no rank 7"):
        prefetch(store, str(folder), ranks=[7], options=IN_PARALLEL)


@pytest.mark.parametrize("what", ["others can write", "another user's", "a file"])
def test_a_folder_that_others_can_change_is_not_used(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    prefetch(store, str(folder), options=IN_PARALLEL)
    if what == "others can write":
        folder.chmod(0o777)
    elif what == "another user's":
        os.chown(folder, 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        folder = next(iter(files_of(folder).values()))
    with caplog.at_level(logging.WARNING, "fastckpt"):
        mine, watched = restored(store, folder)
    assert same(mine, state(1))
    assert [key for key in reads(watched) if key.startswith(keys.DATA)]
    assert len(caplog.records) == (what != "a file")
    with pytest.raises((RepositoryError, FileExistsError)):
        prefetch(store, str(folder), options=IN_PARALLEL)


def test_a_full_disk_leaves_the_rest_to_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = saved(MemoryStore(), 1), tmp_path / "cache"
    put = CacheFolder.put

    def full(self: CacheFolder, key: str, data: Any) -> None:
        if key.startswith(keys.DATA):
            raise OSError(errno.ENOSPC, "no space left")
        put(self, key, data)

    monkeypatch.setattr(CacheFolder, "put", full)
    report = prefetch(store, str(folder), options=IN_PARALLEL)
    assert report.left_bytes > 0
    assert "full" in report.notes[0]
    assert same(restored(store, folder)[0], state(1))


def test_a_checkpoint_that_is_retired_meanwhile_gives_way_to_the_newest(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "cache"
    job = incarnation(store)
    job.choose_and_claim()
    job.save(sealed(state(1)), 1)
    vote = keys_of(store, keys.VOTES)[0]

    def retire(number: int, verb: str, key: str, when: str) -> None:
        if (verb, key, when) == ("head", vote, "before"):
            job.save(sealed(state(2)), 2)
            job.retain(Keep(last=1), grace_s=0.0)

    assert prefetch(FaultyStore(store, hook=retire), str(folder), options=IN_PARALLEL).checkpoint == (1, 2)


def test_what_is_remembered_of_a_long_run_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_names, "_VOTES", 3)
    named = cache_names.CacheNames()
    for step in range(50):
        named.add_vote(VoteName(SaveId(1, step, 0), 0, 1, 0, "99aa06d3014798d86001c324468d497f"), b"", "x")
    assert len(named._votes) == 3


def test_a_store_is_itself_without_a_folder() -> None:
    store = MemoryStore()
    assert cached(store, "") is store


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = str(tmp_path / "run"), tmp_path / "cache"
    status, out, err = run(capsys, "prefetch", url, "--to", str(folder))
    assert (status, out) == (cli.OK, "")  # the first start of a job
    assert "nothing was fetched" in err
    saved(LocalStore(url), 1, 2)
    status, value = run_json(capsys, "prefetch", url, "--to", str(folder))
    assert status == cli.OK
    assert value["schema"] == "fastckpt.prefetch/1"
    assert value["checkpoint"] == {"epoch": 1, "step": 2}
    assert "epoch 1, step 1 of" in run(capsys, "prefetch", url, "--to", str(folder), "--step", "1", "--epoch", "1")[1]
    assert run(capsys, "prefetch", url, "--to", str(folder), "--step", "9")[0] == cli.BAD_CHECKPOINT
    assert run(capsys, "prefetch", url)[0] == cli.USAGE
    for wrong in (["--rank", "x"], ["--rank", "3-1"], ["--max-bytes", "2X"], ["--rank", "123456"]):
        assert run(capsys, "prefetch", url, "--to", str(folder), *wrong)[0] == cli.USAGE
    monkeypatch.setenv("FASTCKPT_CACHE_DIR", str(folder))
    assert run(capsys, "prefetch", url, "--rank", "0-0", "--max-bytes", "0k")[0] == cli.OK
    assert run_json(capsys, "prefetch", url, "--progress")[1]["left_bytes"] == 0


def test_files_are_opened_there_too(tmp_path: Path) -> None:
    """A store on a file system far away gives descriptors; what the folder has is opened there."""
    store, folder = saved(LocalStore(tmp_path / "run"), 1, 2), tmp_path / "cache"
    prefetch(store, str(folder), options=IN_PARALLEL)
    through = cached(store, str(folder))
    through.get(keys_of(store, keys.COMMITS)[1])
    for key in keys_of(store, keys.DATA):
        fd = through.open_file(key)
        try:
            here = os.fstat(fd).st_ino == os.stat(files_of(folder).get(key, tmp_path)).st_ino
            assert here == ("000000000002" in key)
            assert os.pread(fd, 1 << 30, 0) == store.get(key)
        finally:
            os.close(fd)
