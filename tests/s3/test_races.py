"""Incarnations that race on a real server: exactly one history, and nothing acknowledged is lost."""

from __future__ import annotations

import datetime
import json
import platform
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fastckpt
from fastckpt.errors import SupersededError
from fastckpt.format.keys import CheckpointId
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.cloud import S3Store
from fastckpt.store.wrap import Retrying
from tests.s3server import S3Server
from tests.support.repositories import OPTIONS, check_all, history, read
from tests.support.states import same, sealed, small_state

pytestmark = pytest.mark.s3
RESULT = Path(__file__).parent / "results" / "races.json"


def test_two_incarnations_race(s3_server: S3Server, open_store: Callable[..., S3Store]) -> None:
    """30 rounds of two threads on radosgw: some 5 s."""
    race(s3_server, open_store, rounds=30, seed=random.randrange(1 << 32))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_incarnations_race_200_times(s3_server: S3Server, open_store: Callable[..., S3Store]) -> None:
    """About a minute."""
    seed = random.randrange(1 << 32)
    told = race(s3_server, open_store, rounds=200, seed=seed)
    found = {
        "date": datetime.date.today().isoformat(),
        "fastckpt": fastckpt.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "rounds": 200,
        "told that another had taken over": told,
        "acknowledged and lost": 0,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def race(s3_server: S3Server, open_store: Callable[..., S3Store], rounds: int, seed: int) -> int:
    """Rounds of two incarnations at once, each judged. How many were told that another had taken over."""
    print("seed", seed)
    rng = random.Random(seed)
    bucket = s3_server.new_bucket()
    stores = [Retrying(open_store(f"s3://{bucket}/run")) for _ in range(2)]
    values: dict[CheckpointId, float] = {}
    acknowledged: list[CheckpointId] = []
    told = 0
    for round_number in range(rounds):
        failures: list[BaseException] = []
        superseded: list[int] = []
        start = threading.Barrier(2)

        def job(
            i: int,
            saves: int,
            round_number: int = round_number,
            stores: list[Retrying] = stores,
            start: threading.Barrier = start,
            superseded: list[int] = superseded,
            failures: list[BaseException] = failures,
        ) -> None:
            run = Incarnation(Repository(stores[i]), OPTIONS)
            try:
                start.wait()
                choice = run.choose_and_claim()
                step = 0 if choice is None else choice.commit.save.step
                assert run.epoch is not None
                for _ in range(saves):
                    step += 1
                    values[CheckpointId(run.epoch.number, step)] = float(2 * round_number + i)
                    acknowledged.append(run.save(sealed(small_state(float(2 * round_number + i))), step).checkpoint)
            except SupersededError:
                superseded.append(i)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=job, args=(i, rng.randrange(1, 3))) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        told += len(superseded)
        found = history(stores[0])
        assert found == history(stores[1])
        assert len(superseded) < 2, "somebody must go on"
        for checkpoint in acknowledged:
            assert checkpoint in found, f"round {round_number}: {checkpoint} was acknowledged and is not in the history"
        acknowledged.clear()
        newest = Catalog(Repository(stores[0])).choose()
        assert newest is not None
        assert same(read(stores[0], newest.commit), small_state(values[newest.commit.checkpoint]))
        if round_number % 10 == 9:  # a small repository is a fast one
            check_all(stores[0])
            bucket_run = f"s3://{bucket}/run-{round_number}"
            stores = [Retrying(open_store(bucket_run)) for _ in range(2)]
            values.clear()
    print(f"{told} of {2 * rounds} were told that another had taken over")
    assert told > 0
    return told
