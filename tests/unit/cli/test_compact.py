"""`fastckpt compact`: words, statuses, JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastckpt.store.local import LocalStore
from tests.support.command_line import run, run_json
from tests.support.deltas import save_on
from tests.support.repositories import begin, commit_of, save_ranks
from tests.support.states import small_state


@pytest.fixture
def deltas(store: LocalStore, url: str) -> str:
    """Steps 1 and 2; what did not change is named again."""
    begin(store, 1)
    first = small_state(1)
    commit = save_ranks(store, 1, 1, [first])
    save_on(store, commit, 2, [{**first, "noise": small_state(2)["noise"]}])
    return url


def test_without_a_word_on_the_run_it_refuses_and_names_both_ways(
    deltas: str, store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [info.key for info in store.list("")]
    status, out, err = run(capsys, "compact", deltas)
    assert (status, out) == (2, "")
    assert "--run-is-stopped" in err
    assert "--to URL" in err
    assert run(capsys, "compact", deltas, "--to", "x", "--run-is-stopped")[0] == 2
    assert [info.key for info in store.list("")] == before


def test_in_place_and_elsewhere(deltas: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = str(tmp_path / "there")
    status, value = run_json(capsys, "compact", deltas, "--to", there)
    assert status == 0
    assert (value["read"], value["compacted"], value["written"]) == (
        {"epoch": 1, "step": 2},
        {"epoch": 1, "step": 2},
        True,
    )
    assert value["stored_bytes"] == commit_of(LocalStore(there), 2).stored_bytes
    assert run(capsys, "check", there)[0] == 0
    status, out, _ = run(capsys, "compact", deltas, "--run-is-stopped", "--effort", "high")
    assert status == 0
    assert "epoch 2, step 2: written in full of epoch 1, step 2" in out
    assert "full already" in run(capsys, "compact", deltas, "--run-is-stopped")[1]
    assert run(capsys, "check", deltas)[0] == 0


def test_an_unknown_step_and_an_older_one(deltas: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "compact", deltas, "7", "--run-is-stopped")
    assert (status, "no checkpoint of step 7" in err) == (3, True)
    status, _, err = run(capsys, "compact", deltas, "1", "--run-is-stopped")
    assert (status, "--rewind" in err) == (3, True)
    assert run(capsys, "compact", deltas, "1", "--epoch", "1", "--run-is-stopped", "--rewind")[0] == 0
