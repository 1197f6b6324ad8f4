"""What the bytes of a base are worth, learned from the saves before."""

from __future__ import annotations

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.store.memory import MemoryStore
from fastckpt.training.worth import Worth
from tests.support.host_training import MIB, SHORT_S

ROLES = ["", "", "exp_avg", "exp_avg_sq"]


def test_roles_that_were_never_tried_are_alike() -> None:
    worth = Worth()
    assert worth.of("exp_avg") == worth.of("") > 0


def test_the_mean_of_the_newest_save_counts() -> None:
    worth = Worth()
    worth.learn(ROLES, {0: 0.1, 1: 0.3, 2: 0.0})
    assert worth.of("") == pytest.approx(0.2)
    assert worth.of("exp_avg") == 0
    worth.learn(ROLES, {0: 0.5})
    assert worth.of("") == pytest.approx(0.5)


def test_a_role_that_was_given_up_is_tried_again_some_time() -> None:
    worth = Worth()
    worth.learn(ROLES, {0: 0.2, 2: 0.02, 3: 0.4})
    n = 0
    while worth.of("exp_avg") < worth.of(""):
        worth.learn(ROLES, {0: 0.2, 3: 0.4})
        n += 1
    assert 20 < n < 50
    assert worth.of("exp_avg") < worth.of("exp_avg_sq")


def test_a_save_that_compares_nothing_teaches_nothing() -> None:
    worth = Worth()
    worth.learn(ROLES, {2: 0.01})
    worth.learn(ROLES, {})
    assert worth.of("exp_avg") == 0.01


def test_first_moments_are_the_first_to_give_way() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(4)))  # 4 MiB each
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, seen = torch.Generator().manual_seed(1), list[fastckpt.events.BaseIncomplete]()

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    def see(event: object) -> None:
        if isinstance(event, fastckpt.events.BaseIncomplete):
            seen.append(event)

    for _ in range(20):
        step()
    options = Options(threads=2, connections=1, host_budget_bytes=256 * MIB)
    with (
        Checkpointer(MemoryStore(), {"m": model, "o": optimizer}, every=None, spot=None, options=options) as ckpt,
        fastckpt.events.subscribe(see),
    ):
        ckpt._engine.stager.pool.set_budget(88 * MIB)  # slabs of 16 MiB, one for each role; two stay beside a snapshot
        for number in range(1, 4):
            step()
            ckpt.save_now(number).wait(SHORT_S)
            ckpt.wait()
        memory = ckpt._engine.queue.bases.memory
        assert memory is not None
        roles = {place.slab: memory.roles[chunk] for chunk, place in memory._places.items()}
        assert [roles[slab] for slab, kept in memory.slabs.items() if kept.n_bytes > MIB] == [
            "exp_avg",
            "exp_avg_sq",
            "",
        ]
    assert [event.lacking_bytes >> 20 for event in seen] == [16, 16], "one slab of three has given way"
