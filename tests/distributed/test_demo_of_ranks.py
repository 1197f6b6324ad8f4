"""`make demo ARGS="--ranks N"`: a rank is killed and fewer go on; and the demo's comparison notices what is not as it should be."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastckpt
from tests.support.torchrun import EXAMPLES, ROOT

STEPS, BEGIN = 12, 5


def test_the_demo(tmp_path: Path) -> None:
    """Three starts of processes that import torch (3, 2 and 2 of them): some 20 s on two cores."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTCKPT_")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", "--ranks", "3", "--steps", str(STEPS), "--json", "--out", tmp_path],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["ranks"] == [3, 2]
    assert found["restored_step"] in {BEGIN, 2 * BEGIN}
    assert found["killed"]["after_step"] >= found["restored_step"]
    assert sum(found["samples_of_each"]) == found["samples"] == STEPS * 12 - 5
    assert "Rank 1 was killed with SIGKILL" in done.stderr
    assert "\r" not in done.stderr  # bars are for terminals


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo_ranks

    return demo_ranks  # type: ignore[no-any-return]


def told(demo: ModuleType, ranks: int, begin: int, end: int) -> Any:
    """What the ranks of a good start say."""
    found = demo.Told(ranks, restored_at=begin, durable=BEGIN)
    samplers = [
        iter(
            fastckpt.ElasticSampler(
                demo.samples_of(STEPS), batch_size=demo.BATCH, seed=demo.SEED, rank=rank, world=ranks
            )
        )
        for rank in range(ranks)
    ]
    for step in range(1, end + 1):
        for rank in range(ranks):
            samples = next(samplers[rank])
            if step > begin:
                found.samples[step][rank], found.losses[step][rank] = samples, 1 / step
    for when in ("state at first", f"state at {BEGIN}", "state at last"):
        found.states[when] = {"model/weight": f"at {end if when.endswith('last') else BEGIN}"}
        for rank in range(ranks):
            found.generators[when][rank] = {"rng/torch": f"{when == 'state at last'} {rank}"}
    return found


def lose_a_sample(told: Any) -> None:
    told.samples[STEPS][1].pop()


def swap_samples(told: Any) -> None:
    told.samples[STEPS][1].reverse()


def see_samples_again(told: Any) -> None:
    told.samples[BEGIN + 2] = told.samples[BEGIN + 1]


def change_a_loss(told: Any) -> None:
    told.losses[BEGIN + 1][0] += 2**-50


def change_what_was_restored(told: Any) -> None:
    told.states["state at first"] = {"model/weight": "another"}


def change_the_end(told: Any) -> None:
    told.states["state at last"] = {"model/weight": "another"}


def draw_other_numbers(told: Any) -> None:
    told.generators["state at last"][1] = {"rng/torch": "another"}


def learn_nothing(told: Any) -> None:
    told.losses[STEPS] = dict.fromkeys(told.losses[STEPS], 2.0)


def restore_an_older_step(told: Any) -> None:
    told.restored_at = BEGIN - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_a_sample, "1 were lost, and 0 were seen more than once"),
        (swap_samples, "are not those of a single process"),
        (see_samples_again, "12 were lost, and 12 were seen more than once"),
        (change_a_loss, "losses of 1 steps are not the reference's, first at step 6"),
        (change_what_was_restored, "what 4 ranks had at step 5"),
        (change_the_end, "the state after the last step"),
        (draw_other_numbers, "the generators of rank 1 after the last step"),
        (learn_nothing, "did not learn: loss 1.0 at first, 2.0 at last"),
        (restore_an_older_step, "step 5 was durable, but step 4 was restored"),
    ],
)
def test_what_is_wrong_is_noticed(demo: ModuleType, change: Callable[[Any], None], words: str) -> None:
    one, two = told(demo, 4, 0, BEGIN + 2), told(demo, 3, BEGIN, STEPS)
    assert demo.judge(one, two, copy.deepcopy(two), STEPS) == []
    wrong = copy.deepcopy(two)
    change(wrong)
    found = demo.judge(one, wrong, copy.deepcopy(two), STEPS)
    assert any(words in problem for problem in found), found
