"""`fastckpt prune`: what it asks, refuses, deletes and forecasts."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from fastckpt import cli
from fastckpt.cli.prune import forecast, keep_of, needs_of
from fastckpt.errors import CheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, commit_key
from fastckpt.format.repository_records import Pin, pin_bytes, utc_now
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.collector import Collector
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.local import LocalStore
from tests.support.command_line import rewound, run, run_json
from tests.support.repositories import IN_PARALLEL, keys_of, reuse, save_steps

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


def test_prune_keeps_by_time_and_by_step(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2, 3, 4])
    argv = ["prune", url, "--keep-last", "1", "--run-is-stopped", "--yes"]
    assert run(capsys, *argv, "--keep-for-minutes", "60")[0] == cli.OK
    assert steps_of(store) == [4, 3, 2, 1]
    assert run(capsys, *argv, "--keep-steps", "2", "--keep-every-minutes", "60")[0] == cli.OK
    assert steps_of(store) == [4, 2, 1]


def test_what_checkpoints_refer_to_stays_and_is_counted(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1])
    reuse(store, 1, 2)
    save_steps(store, [3])  # of epoch 2, after the restore that epoch 1's newest one is given to
    n_bytes = {info.key: info.n_bytes for info in store.list("data/")}
    first = sum(n for key, n in n_bytes.items() if "-000000000001-" in key)
    argv = ["prune", url, "--keep-last", "2", "--run-is-stopped"]
    status, value = run_json(capsys, *argv, "--yes")
    assert status == cli.OK
    assert value["base_bytes"] == first
    assert value["waiting_bytes"] == 0
    assert steps_of(store) == [3, 2]
    (listed,) = run_json(capsys, "ls", url)[1]["repositories"]
    assert (listed["stored_bytes"], listed["base_bytes"], listed["grace_bytes"]) == (sum(n_bytes.values()), first, 0)
    assert "to which checkpoints refer" in run(capsys, "ls", url)[2]
    assert "refer to them" in run(capsys, *argv, "--dry-run")[1]
    assert run(capsys, "prune", url, "--keep-last", "1", "--run-is-stopped", "--grace", "3600", "--yes")[0] == cli.OK
    (listed,) = run_json(capsys, "ls", url)[1]["repositories"]
    assert (listed["base_bytes"], listed["grace_bytes"]) == (0, first)
    assert run(capsys, "prune", url, "--keep-last", "1", "--run-is-stopped", "--yes")[0] == cli.OK
    assert len(keys_of(store, "data/")) == 1
    assert run(capsys, "check", url)[0] == cli.OK


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
        ["--keep-every-minutes", "0"],
        ["--keep-for-minutes", "-1"],
        ["--keep-steps", "1,x"],
        ["--keep-best-count", "0"],
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
        Incarnation(Repository(store), IN_PARALLEL).choose_and_claim()
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
    arguments = argparse.Namespace(
        keep_last=1,
        keep_every=None,
        keep_every_minutes=None,
        keep_for_minutes=None,
        keep_steps="5,3",
        keep_best="eval:loss:max",
        keep_best_count=2,
        grace=0.0,
    )
    assert keep_of(arguments) == Keep(last=1, steps=(3, 5), best="eval:loss", mode="max", best_count=2)
