"""The command line on repositories: directories that Incarnation made, as a person and as a program meet them."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.cli import output, target
from fastckpt.cli.output import clean
from fastckpt.cli.pruning import forecast, keep_of, needs_of
from fastckpt.errors import CheckpointError, NoCheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, commit_key, epoch_key
from fastckpt.format.repository_records import Pin, pin_bytes, utc_now
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.collector import Collector
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.local import LocalStore
from fastckpt.writing.rank import SaveAsked
from tests.unit.repository_tools import (
    OPTIONS,
    begin,
    captured,
    flip,
    keys_of,
    same,
    save_ranks,
    save_steps,
    state,
    vote,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def store(url: str) -> LocalStore:
    return LocalStore(url)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """stdin is a terminal at which somebody types."""

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    def type_in(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", Typed(text))

    return type_in  # type: ignore[return-value]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(list(argv))
    said = capsys.readouterr()
    return status, said.out, said.err


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    status, out, _ = run(capsys, *argv, "--json")
    value: dict[str, Any] = json.loads(out)
    return status, value


def rewound(store: LocalStore) -> None:
    """Epoch 1: steps 1 to 3. Epoch 2 goes on from 2 with 4; and one rank of two voted for 9."""
    save_steps(store, [1, 2, 3], {1: {"loss": 3.0}, 2: {"loss": 1.0}, 3: {"loss": float("nan")}})
    job = Incarnation(Repository(store), OPTIONS)
    job.restore(2)
    job.save(captured(state(4)), SaveAsked(4, metrics={"loss": 2.0}))
    vote(store, 2, 9, 0, 2, state(9))


# ls


def test_ls(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    status, value = run_json(capsys, "ls", url)
    assert status == cli.OK
    assert value["schema"] == "fastckpt.ls/1"
    assert value["checkpoints"] == []
    (found,) = value["repositories"]
    rows = [(c["epoch"], c["step"], c["branch"], c["newest"]) for c in found["checkpoints"]]
    assert rows == [
        (2, 9, "unfinished", False),
        (2, 4, "history", True),
        (1, 3, "abandoned", False),
        (1, 2, "history", False),
        (1, 1, "history", False),
    ]
    assert found["checkpoints"][2]["metrics"] == {"loss": "NaN"}
    assert found["checkpoints"][1]["raw_bytes"] > 1_000_000
    status, out, _ = run(capsys, "ls", url)
    lines = out.splitlines()
    assert status == cli.OK
    assert lines[0].split()[:3] == ["epoch", "step", "when"]
    assert "unfinished: votes of 1 of 2 ranks" in lines[1]
    assert lines[2].endswith("newest")
    assert "loss=2" in lines[2]
    assert lines[3].endswith("abandoned")


def test_ls_shows_what_is_damaged(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    flip(store, commit_key(CheckpointId(1, 2)))
    status, out, _ = run(capsys, "ls", url)
    assert status == cli.OK
    assert "damaged: see fastckpt check" in out.splitlines()[1]
    flip(store, epoch_key(1))
    status, value = run_json(capsys, "ls", url)
    assert status == cli.OK
    assert [c["branch"] for c in value["repositories"][0]["checkpoints"]] == ["damaged", "unknown"]


def test_ls_of_a_mixture(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    fastckpt.save({"a": 1}, tmp_path / "a.fckpt")
    _, value = run_json(capsys, "ls", url, str(tmp_path))
    assert len(value["checkpoints"]) == len(value["repositories"]) == 1
    assert cli.main(["ls", f"file://{url}"]) == cli.OK


def test_ls_of_an_empty_repository(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Repository(store).initialise()
    status, out, err = run(capsys, "ls", url)
    assert (status, out) == (cli.OK, "")
    assert "no checkpoints" in err


# show


def test_show(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    status, value = run_json(capsys, "show", url)
    assert (status, value["schema"], value["step"]) == (cli.OK, "fastckpt.show-repository/1", 4)
    assert value["parent"] == {"epoch": 1, "step": 2}
    (rank,) = value["ranks"]
    assert ["model", "weight"] in [tensor["name"] for tensor in rank["tensors"]]
    assert rank["packs"] == 1
    assert rank["shared_bytes"] == 0
    assert run_json(capsys, "show", url, "--step", "3")[1]["branch"] == "abandoned"
    status, out, _ = run(capsys, "show", url, "--step", "2")
    assert status == cli.OK
    assert "model.weight" in out
    assert re.search(r"metrics +loss=1.0", out)


def test_show_of_several_ranks_with_one_damaged(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ranks(store, begin(store, 2).number, 1, [state(1), state(2)])
    store.delete(keys_of(store, "votes/")[1])
    status, out, err = run(capsys, "show", url)
    assert status == cli.BAD_CHECKPOINT
    assert "model.weight" in out
    assert "rank 1 cannot be shown" in err


def test_steps_that_are_not_there(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    for argv in (
        ["show", url, "--step", "7"],
        ["show", url, "--epoch", "7"],
        ["restore", url, "--step", "7", "--out", "x"],
    ):
        status, _, err = run(capsys, *argv)
        assert status == cli.BAD_CHECKPOINT
        assert "fastckpt ls" in err
    status, _, err = run(capsys, "salvage", url, "7", "--out", "x")
    assert status == cli.BAD_CHECKPOINT


# check


def test_check(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    status, out, _ = run(capsys, "check", url)
    assert status == cli.OK
    assert "epoch 1, step 3, abandoned: ok" in out
    assert "unfinished save of epoch 2, step 9" in out
    assert re.search(r"\d packs, .*MiB, \d+ chunks verified", out)
    key = keys_of(store, "data/000001-000000000002-000/")[0]
    flip(store, key, 3)
    status, out, err = run(capsys, "check", url)
    assert status == cli.FOUND_DAMAGE
    assert f"{key}: DAMAGED: " in out
    assert "1 tensors cannot be restored: array" in out
    assert "fastckpt salvage" in err
    status, value = run_json(capsys, "check", url)
    (found,) = value["repositories"]
    assert status == cli.FOUND_DAMAGE
    assert not found["ok"]
    assert found["damage"][0]["key"] == key
    assert found["damage"][0]["checkpoint"] == {"epoch": 1, "step": 2}
    assert [c["state"] for c in found["checkpoints"]] == ["ok", "ok", "damaged", "ok"]
    assert found["repair"] is None
    assert run(capsys, "check", url, "--quick")[0] == cli.OK
    assert run(capsys, "check", url, "--step", "3")[0] == cli.OK
    assert run(capsys, "check", url, "--step", "2")[0] == cli.FOUND_DAMAGE


def test_check_of_a_repository_without_marker(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    store.delete("fastckpt.json")
    status, out, _ = run(capsys, "check", url)
    assert status == cli.FOUND_DAMAGE
    assert "fastckpt.json: DAMAGED" in out


def test_check_of_a_repository_without_checkpoints(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that never saved, or a wrong prefix, must not pass for one that is well."""
    begin(store, 1)
    status, out, _ = run(capsys, "check", url)
    assert (status, out) == (cli.BAD_CHECKPOINT, f"{store.url}: no checkpoints: nothing to verify\n")
    status, value = run_json(capsys, "check", url)
    assert (status, value["repositories"][0]["ok"]) == (cli.BAD_CHECKPOINT, True)
    store.put("fastckpt.json", b"{}")
    assert run(capsys, "check", url)[0] == cli.FOUND_DAMAGE


def test_check_of_a_step_that_is_not_there(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    status, out, _ = run(capsys, "check", url, "--step", "7")
    assert status == cli.BAD_CHECKPOINT
    assert "no checkpoints of step 7: nothing to verify" in out


def test_check_of_a_repository_and_a_file(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1])
    fastckpt.save({"a": torch.ones(3)}, tmp_path / "a")
    status, value = run_json(capsys, "check", str(tmp_path / "a"), url)
    assert status == cli.OK
    assert value["checked"][0]["ok"]
    assert value["repositories"][0]["ok"]


def test_repair_needs_a_yes(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str], terminal: Any) -> None:
    save_steps(store, [1])
    vote(store, 1, 5, 0, 1, state(5))
    status, out, err = run(capsys, "check", url, "--repair")
    assert status == cli.USAGE
    assert "to repair: commit epoch 1, step 5, try 0: the next restore continues from it" in out
    assert "--yes" in err
    status, value = run_json(capsys, "check", url, "--repair")
    assert status == cli.USAGE
    assert value["repositories"][0]["repair"]["done"] == []
    terminal("n\n")
    assert run(capsys, "check", url, "--repair")[0] == cli.OK
    assert keys_of(store, "commits/") == [commit_key(CheckpointId(1, 1))]
    terminal("y\n")
    status, out, _ = run(capsys, "check", url, "--repair")
    assert status == cli.OK
    assert "step 5: committed" in out
    choice = Catalog(Repository(store)).choose()
    assert choice is not None
    assert choice.commit.save.step == 5
    status, out, _ = run(capsys, "check", url, "--repair", "--yes")
    assert status == cli.OK
    assert "nothing to repair" in out


def test_repair_with_yes_and_json(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, 2)
    for rank in range(2):
        vote(store, 1, 5, rank, 2, state(rank))
    status, value = run_json(capsys, "check", url, "--repair", "--yes")
    assert status == cli.OK
    assert value["repositories"][0]["repair"]["done"] == [{"epoch": 1, "step": 5, "error": None}]
    assert run(capsys, "check", url)[0] == cli.OK


# prune


def steps_of(store: LocalStore) -> list[int]:
    return [c.step for c in Catalog(Repository(store)).history()]


def test_prune_refuses_while_a_job_may_run(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    status, _, err = run(capsys, "prune", url, "--keep-last", "1", "--yes")
    assert status == cli.USAGE
    assert "--run-is-stopped" in err
    assert "Keep(last" in err
    assert steps_of(store) == [2, 1]


def test_a_dry_run_needs_no_word_about_the_job(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    before = keys_of(store, "")
    status, out, _ = run(capsys, "prune", url, "--keep-last", "1", "--dry-run")
    assert status == cli.OK
    assert "remove epoch 1, step 1" in out
    assert run_json(capsys, "prune", url, "--keep-last", "1", "--dry-run", "--run-is-stopped")[1]["done"] is False
    assert keys_of(store, "") == before


def test_the_usage_of_prune_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """It is written by hand: argparse would show what is required as optional."""
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    usage, _, options = capsys.readouterr().out.partition("\n\n")
    assert "(--run-is-stopped | --dry-run)" in usage
    listed = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", options, re.M))
    assert listed == {"--help", *re.findall(r"--[a-z-]+", usage)}


def test_prune(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    before = sum(info.n_bytes for info in store.list(""))
    argv = ["prune", url, "--keep-last", "1", "--run-is-stopped"]
    status, value = run_json(capsys, *argv)
    assert status == cli.USAGE, "a plan alone: nobody said yes"
    assert value["done"] is False
    assert steps_of(store) == [4, 2, 1]
    status, out, _ = run(capsys, *argv, "--dry-run")
    assert status == cli.OK
    assert "remove epoch 1, step 1" in out
    assert steps_of(store) == [4, 2, 1]
    status, out, _ = run(capsys, *argv, "--yes")
    assert status == cli.OK
    assert steps_of(store) == [4]
    after = sum(info.n_bytes for info in store.list(""))
    # The commit records that tombstones replaced, and these tombstones, are the only difference.
    assert abs((before - after) - value["freed_bytes"]) < 5000
    assert keys_of(store, "commits/") == [commit_key(CheckpointId(1, 3)), commit_key(CheckpointId(2, 4))]
    assert run(capsys, "check", url)[0] == cli.OK
    assert f"{len(value['delete'])} objects deleted" in out
    status, value = run_json(capsys, *argv, "--yes")
    assert (status, value["retire"], value["delete"], value["done"]) == (cli.OK, [], [], False)


def test_prune_of_branches_and_rules(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    argv = ["prune", url, "--keep-last", "1", "--keep-best", "loss:min", "--branches", "--run-is-stopped", "--yes"]
    assert run(capsys, *argv)[0] == cli.OK
    assert keys_of(store, "commits/") == [commit_key(CheckpointId(1, 2)), commit_key(CheckpointId(2, 4))]
    assert run(capsys, "check", url)[0] == cli.OK


def test_prune_keeps_every(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [2, 3, 4, 5, 6])
    assert run(capsys, "prune", url, "--keep-last", "1", "--keep-every", "3", "--run-is-stopped", "--yes")[0] == cli.OK
    assert steps_of(store) == [6, 3]


def test_prune_with_grace_leaves_packs(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    argv = ["prune", url, "--keep-last", "1", "--run-is-stopped", "--grace", "3600", "--yes"]
    status, out, _ = run(capsys, *argv)
    assert status == cli.OK
    assert "once the grace is over" in out
    assert len(keys_of(store, "data/")) == 2
    assert steps_of(store) == [2]
    assert run(capsys, "prune", url, "--keep-last", "1", "--run-is-stopped", "--yes")[0] == cli.OK
    assert len(keys_of(store, "data/")) == 1


def test_prune_leaves_what_is_pinned_and_says_so(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2, 3])
    store.put(keys.pin_key("me"), pin_bytes(Pin(CheckpointId(1, 1), 3600, "me", utc_now())))
    status, _, err = run(capsys, "prune", url, "--keep-last", "1", "--run-is-stopped", "--yes")
    assert status == cli.OK
    assert "pinned" in err
    assert steps_of(store) == [3, 1]


def test_prune_asks_at_a_terminal(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str], terminal: Any
) -> None:
    save_steps(store, [1, 2])
    argv = ["prune", url, "--keep-last", "1", "--run-is-stopped"]
    terminal("\n")
    status, _, err = run(capsys, *argv)
    assert status == cli.OK
    assert "nothing was changed" in err
    assert steps_of(store) == [2, 1]
    terminal("yes\n")
    assert run(capsys, *argv)[0] == cli.OK
    assert steps_of(store) == [2]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--keep-last", "0"],
        ["--keep-every", "0"],
        ["--keep-best", "loss"],
        ["--keep-best", "loss:most"],
        ["--grace", "-1"],
    ],
)
def test_prune_rules_are_checked(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    save_steps(store, [1, 2])
    argv = ["prune", url, "--keep-last", "1", "--run-is-stopped", "--yes", *wrong]
    assert run(capsys, *argv)[0] == cli.USAGE
    assert steps_of(store) == [2, 1]


def test_prune_stops_when_a_job_starts(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(store, [1, 2])
    run_pass = Collector.run

    def then_start(self: Collector, todo: Any, as_epoch: int | None) -> list[CheckpointError]:
        refused = run_pass(self, todo, as_epoch)
        Incarnation(Repository(store), OPTIONS).restore()
        return refused

    monkeypatch.setattr(Collector, "run", then_start)
    status, _, err = run(capsys, "prune", url, "--keep-last", "1", "--run-is-stopped", "--yes")
    assert status == cli.BAD_CHECKPOINT
    assert "a job has started" in err
    assert run(capsys, "check", url)[0] == cli.OK


def test_a_forecast_is_what_happens(store: LocalStore, url: str) -> None:
    rewound(store)
    collector = Collector(Repository(store))
    view = collector.look()
    found = forecast(view, needs_of(Repository(store), view), Keep(last=2), 0.0, True)
    before = set(keys_of(store, ""))
    argv = ["prune", url, "--keep-last", "2", "--branches", "--run-is-stopped", "--yes"]
    assert cli.main(argv) == cli.OK
    assert before - set(keys_of(store, "")) == set(found.delete) & before


def test_a_metric_may_have_a_colon() -> None:
    arguments = argparse.Namespace(keep_best="eval:loss:max", keep_last=1, keep_every=None, grace=0.0)
    assert keep_of(arguments) == Keep(last=1, best="eval:loss", mode="max")


# restore


def test_restore(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    out = str(tmp_path / "out.fckpt")
    status, said, _ = run(capsys, "restore", url, "--out", out)
    assert status == cli.OK
    assert "epoch 2, step 4" in said
    assert same(fastckpt.load(out, weights_only=False), state(4))
    assert run(capsys, "check", out)[0] == cli.OK
    status, _, err = run(capsys, "restore", url, "--out", out, "--step", "3")
    assert status == cli.USAGE
    assert "--force" in err
    status, value = run_json(capsys, "restore", url, "--out", out, "--step", "3", "--force")
    assert status == cli.OK
    assert (value["step"], value["container_bytes"]) == (3, os.path.getsize(out))
    assert same(fastckpt.load(out, weights_only=False), state(3))
    assert run(capsys, "restore", url, "--out", out, "--epoch", "1", "--force")[0] == cli.OK
    assert same(fastckpt.load(out, weights_only=False), state(2)), "of epoch 1, the history has step 2"


def test_restore_of_a_rank(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_ranks(store, begin(store, 2).number, 1, [state(1), state(2)])
    out = str(tmp_path / "out")
    status, _, err = run(capsys, "restore", url, "--rank", "1", "--out", out)
    assert status == cli.OK
    assert "--rank" in err
    assert same(fastckpt.load(out, weights_only=False), state(2))
    assert run(capsys, "restore", url, "--rank", "2", "--out", f"{out}2")[0] == cli.BAD_CHECKPOINT


def test_restore_of_damage_names_the_next_step(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2])
    store.delete(keys_of(store, "data/")[1])
    status, _, err = run(capsys, "restore", url, "--out", str(tmp_path / "out"))
    assert status == cli.BAD_CHECKPOINT
    assert "restore(step=1)" in err
    flip(store, keys_of(store, "data/")[0])
    status, _, err = run(capsys, "restore", url, "--step", "1", "--out", str(tmp_path / "out"))
    assert status == cli.BAD_CHECKPOINT
    assert "fastckpt salvage" in err
    assert not (tmp_path / "out").exists()


# salvage


def test_salvage(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    out = tmp_path / "out"
    status, _, err = run(capsys, "salvage", url, "--out", str(out))
    assert status == cli.OK
    assert "fastckpt restore" in err
    flip(store, keys_of(store, "data/")[1], 3)
    assert run(capsys, "salvage", url, "--out", str(out))[0] == cli.USAGE
    status, said, err = run(capsys, "salvage", url, "--out", str(out), "--force")
    assert status == cli.FOUND_DAMAGE
    assert "8 tensors" in said
    assert "LOST: array" in err
    assert "whole in epoch 1, step 1" in err
    status, value = run_json(capsys, "salvage", url, "--out", str(out), "--force")
    assert status == cli.FOUND_DAMAGE
    assert value == json.loads((out / "report.json").read_text())


def test_salvage_of_a_damaged_commit_record(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2])
    flip(store, commit_key(CheckpointId(1, 2)))
    status, _, err = run(capsys, "salvage", url, "--out", str(tmp_path / "out"))
    assert status == cli.OK, "all tensors were there"
    assert "commit record of epoch 1, step 2 is not right" in err
    flip(store, "fastckpt.json")
    status, _, err = run(capsys, "salvage", url, "1", "--out", str(tmp_path / "out2"))
    assert status == cli.OK
    assert "fastckpt.json is damaged" in err


# what goes wrong


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["prune", "{tmp}/none", "--keep-last", "1", "--run-is-stopped"], cli.OS_ERROR),
        (["prune", "{tmp}", "--keep-last", "1", "--run-is-stopped"], cli.BAD_CHECKPOINT),
        (["restore", "{tmp}", "--out", "{tmp}/x"], cli.BAD_CHECKPOINT),
        (["restore", "{tmp}/none", "--out", "{tmp}/x"], cli.OS_ERROR),
        (["salvage", "{tmp}/text", "--out", "{tmp}/x"], cli.BAD_CHECKPOINT),
        (["show", "{tmp}/text", "--step", "3"], cli.USAGE),
        (["ls", "gs://bucket/x"], cli.USAGE),
        (["show", "s4://bucket/x"], cli.USAGE),
        (["check", "s3:///x"], cli.USAGE),
        (["ls", "file://host/x"], cli.USAGE),
        (["ls", "s3://bucket/x", "--endpoint-url", "foo"], cli.USAGE),
        (["check", "{tmp}/run", "--endpoint-url", "http://host:port"], cli.USAGE),
        (["analyze", "{tmp}"], cli.OS_ERROR),
        (["ls", "memory://empty-{tmp}"], cli.BAD_CHECKPOINT),
        (["show", "memory://nothing/x"], cli.OS_ERROR),
        (["restore", "{tmp}/run", "--out", "{tmp}/no/x"], cli.OS_ERROR),
    ],
)
def test_exit_status(argv: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    save_steps(LocalStore(tmp_path / "run"), [1])
    arguments = [text.replace("{tmp}", str(tmp_path)) for text in argv]
    found, _, err = run(capsys, *arguments)
    assert found == status
    assert err.startswith("fastckpt: ")
    assert "Traceback" not in err
    assert run_json(capsys, *arguments)[1]["exit"] == status


def test_wrong_environment(url: str, store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    save_steps(store, [1])
    monkeypatch.setenv("FASTCKPT_THREADS", "many")
    status, _, err = run(capsys, "check", url)
    assert status == cli.USAGE
    assert "FASTCKPT_THREADS" in err


@pytest.mark.parametrize("command", ["check", "show", "analyze", "ls"])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("FASTCKPT_KERNELS", "foo", "one of auto, native, numba, reference"),
        ("FASTCKPT_THREADS", "abc", "an integer ≥ 0"),
        ("FASTCKPT_MAX_LOAD_BYTES", "-5", "an integer ≥ 0"),
    ],
)
def test_wrong_environment_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    text: str,
    expected: str,
) -> None:
    file = tmp_path / "a"
    fastckpt.save({"a": torch.ones(3)}, file)
    monkeypatch.setenv(name, text)
    message = f"{name} is {text!r}: expected {expected}"
    assert run(capsys, command, str(file)) == (cli.USAGE, "", f"fastckpt: {message}\n")
    status, value = run_json(capsys, command, str(file))
    assert (status, value["schema"], value["exit"]) == (cli.USAGE, "fastckpt.error/1", cli.USAGE)
    assert value["message"] == message


def test_a_wrong_endpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    err = run(capsys, "ls", "s3://bucket/x", "--endpoint-url", "minio:9000")[2]
    assert "--endpoint-url is 'minio:9000': expected http:// or https:// and a host" in err


def test_an_interrupt(url: str, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, [1])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastckpt.upkeep.check.repository.check_repository", interrupt)
    assert cli.main(["check", url]) == cli.INTERRUPTED


# hostile text


EVIL = "a\x1b]0;owned\x07\x9b31m\u202eb\u2028\x7f\nc"


def test_clean() -> None:
    assert clean(EVIL) == r"a\x1b]0;owned\x07\x9b31m\u202eb\u2028\x7f\x0ac"
    assert clean("a\nb\x1b", keep_lines=True) == "a\nb\\x1b"
    assert clean("ok äé漢字 – ≥ 🙂") == "ok äé漢字 – ≥ 🙂"
    assert clean("\ud800\U000e0041") == "\\ud800\\U000e0041"


def test_names_metrics_and_meta_cannot_reach_the_terminal(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Incarnation(Repository(store), OPTIONS)
    evil = EVIL.replace("\n", "")
    obj = {EVIL: torch.randn(1000)}
    job.save(captured(obj), SaveAsked(1, trigger=evil, metrics={evil: 1.0}, meta={"x": evil}))
    flip(store, keys_of(store, "data/")[0])
    out = str(tmp_path / "out")
    commands = [["ls", url], ["show", url], ["check", url], ["salvage", url, "--out", out, "--force"]]
    commands.append(["restore", url, "--out", out + "2"])
    for argv in commands:
        for more in ([], ["--json"]):
            _, said, err = run(capsys, *argv, *more)
            assert not set("\x1b\x07\x9b\u202e\u2028\x7f") & set(said + err), argv
            if more:
                json.loads(said)
    value = run_json(capsys, "show", url)[1]
    assert value["ranks"][0]["tensors"][0]["name"] == [EVIL], "JSON says what is there"


def test_a_bar_is_drawn_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    draw = output.bar("x\x1b")
    draw(1, 3)
    draw(1, 3)
    draw(2, 3)
    draw(3, 3)
    assert screen.getvalue().count("%") == 2
    assert screen.getvalue().startswith("\rx\\x1b [")
    assert screen.getvalue().endswith("\r\x1b[K")
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    output.bar("x")(1, 3)
    assert quiet.getvalue() == ""


def test_find() -> None:
    inside = [CheckpointId(3, 9), CheckpointId(1, 5)]
    known = [CheckpointId(1, 5), CheckpointId(1, 7), CheckpointId(2, 7), CheckpointId(3, 9), CheckpointId(2, 5)]

    def found(step: int | None, epoch: int | None, history: list[CheckpointId] | None = inside) -> tuple[int, int]:
        return target.find("url", history, known, step, epoch)

    assert found(None, None) == (3, 9)
    assert found(5, None) == (1, 5), "of several, the history's"
    assert found(7, None) == (2, 7)
    assert found(7, 1) == (1, 7)
    assert found(None, 2) == (2, 7)
    assert found(None, None, None) == (3, 9)
    with pytest.raises(NoCheckpointError, match="step 8 of epoch 1"):
        found(8, 1)
    with pytest.raises(NoCheckpointError):
        found(None, None, [])


def test_an_endpoint_reaches_the_store(monkeypatch: pytest.MonkeyPatch, store: LocalStore) -> None:
    save_steps(store, [1])
    seen = []

    def opened(url: str, **settings: Any) -> LocalStore:
        seen.append((url, settings))
        return store

    monkeypatch.setattr(target, "open_store", opened)
    assert cli.main(["ls", "s3://bucket/run", "--endpoint-url", "http://127.0.0.1:9"]) == cli.OK
    assert cli.main(["check", "s3://bucket/run"]) == cli.OK
    assert seen == [("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9"}), ("s3://bucket/run", {})]


def test_a_container_at_a_url(
    monkeypatch: pytest.MonkeyPatch, store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = io.BytesIO()
    fastckpt.save({"a": torch.ones(4)}, sink)
    store.put("x/a.fckpt", sink.getvalue())

    def opened(url: str, **_: Any) -> LocalStore:
        return store if url == "s3://bucket/x" else LocalStore("/nonexistent")

    sub = LocalStore(Path(store.url.removeprefix("file://")) / "x")
    monkeypatch.setattr(target, "open_store", lambda url, **_: sub if url == "s3://bucket/x" else opened(url))
    assert cli.main(["check", "s3://bucket/x/a.fckpt"]) == cli.OK
    assert "1 chunks" in capsys.readouterr().out
