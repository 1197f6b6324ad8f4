"""`ls` and `show` of checkpoints that need packs of earlier saves."""

from __future__ import annotations

import pytest

from fastckpt.format import keys
from fastckpt.kernels.transform import Transform
from fastckpt.repository.commit import open_vote
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.stored_as import stored_as
from tests.support.command_line import run, run_json
from tests.support.deltas import chain
from tests.support.repositories import commit_of, keys_of, save_steps


def test_ls_tells_what_is_needed_of_earlier_saves_and_which_are_full(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chain(store, 3, world=2)
    status, value = run_json(capsys, "ls", url)
    assert status == 0
    found = {one["step"]: one["earlier_bytes"] for one in value["repositories"][0]["checkpoints"]}
    shown = {step: run_json(capsys, "show", url, "--step", str(step))[1] for step in (1, 2, 3)}
    assert found == {step: one["earlier_bytes"] for step, one in shown.items()}
    assert found[1] == 0 < found[2] < found[3]
    lines = run(capsys, "ls", url)[1].splitlines()
    assert "of earlier" in lines[0]
    assert [" full " in line for line in lines[1:]] == [False, False, True]


def test_ls_of_full_saves_has_no_such_column(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    out = run(capsys, "ls", url)[1]
    assert "of earlier" not in out
    assert "full" not in out


def test_ls_of_votes_that_are_gone_or_hostile_leaves_the_figure_out(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chain(store, 3)
    (two,) = keys_of(store, "votes/000001-000000000002-000/")
    store.put(two, bytes(len(store.get(two))))
    (three,) = keys_of(store, "votes/000001-000000000003-000/")
    store.delete(three)
    status, value = run_json(capsys, "ls", url)
    assert status == 0
    assert {one["step"]: one["earlier_bytes"] for one in value["repositories"][0]["checkpoints"]} == {
        1: 0,
        2: None,
        3: None,
    }


def test_show_tells_transforms_chains_and_what_a_restore_reads(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chain(store, 3)
    status, value = run_json(capsys, "show", url)
    assert status == 0
    commit = commit_of(store, 3)
    rows = open_vote(store, commit.vote(0)).records
    read = int(rows["stored_bytes"].sum())  # every row is needed here, once
    assert (value["full"], value["read_bytes"], value["longest_chain"]) == (False, read, 2)
    assert value["earlier_bytes"] == read - commit.stored_bytes
    assert value["read_amplification"] == round(read / value["full_bytes"], 4)
    first = open_vote(store, commit_of(store, 1).vote(0)).records
    assert value["full_bytes"] == pytest.approx(int(first["stored_bytes"].sum()), rel=0.01)
    by_name = {one["transform"]: one for one in value["transforms"]}
    assert by_name["CAST"]["stored_bytes"] == 0
    assert by_name["ROT of earlier saves"]["chunks"] == 1
    assert sum(one["stored_bytes"] for one in by_name.values()) == read
    out = run(capsys, "show", url)[1]
    assert "up to 2 differences one after another" in out
    out = run(capsys, "show", url, "--step", "1")[1]
    assert "full, it needs no earlier save" in out


def test_equal_chunks_are_read_once(store: LocalStore) -> None:
    save_steps(store, [1])
    commit = commit_of(store, 1)
    found = stored_as(open_vote(store, commit.vote(0)), commit.save)
    assert (found.read_bytes, found.full_bytes, found.earlier_bytes) == (commit.stored_bytes, commit.stored_bytes, 0)
    assert found.is_full
    assert Transform.CONST.name in found.transforms
    assert keys_of(store, keys.DATA)
