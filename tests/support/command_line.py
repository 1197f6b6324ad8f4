"""The command line in this process, and a repository to look at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastckpt import cli
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.writing.rank import SaveAsked
from tests.support.repositories import IN_PARALLEL, save_steps, vote
from tests.support.states import rich_state, sealed


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
    job = Incarnation(Repository(store), IN_PARALLEL)
    job.choose_and_claim(2)
    job.save(sealed(rich_state(4)), SaveAsked(4, metrics={"loss": 2.0}))
    vote(store, 2, 9, 0, 2, rich_state(9))
