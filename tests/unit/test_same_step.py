"""Steps that are saved twice: with another state that is an error, unchanged it is that save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastckpt import Every, RNGState
from fastckpt.errors import SaveError, StoreUnavailableError
from fastckpt.store.memory import MemoryStore
from tests.support.stores import HeldStore
from tests.support.swaps import SHORT_S, Job, committed, open_on


def everything() -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """A state, and ways to change it."""
    job = Job(2, 40)
    job.step()
    model, optimizer = job.model, job.optimizer
    weight = model[0].weight
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    extra: dict[str, Any] = {"epoch": 1, "history": [0.5], "table": torch.zeros(3), "names": {"a"}}
    state = {**job.state, "schedule": schedule, "extra": extra, "rng": RNGState()}

    def in_place() -> None:
        with torch.no_grad():
            weight.fill_(5)

    def replaced() -> None:
        weight.data = weight.data + 1  # type: ignore[assignment]

    return state, {
        "a step": job.step,
        "in place": in_place,
        "data": lambda: weight.data.add_(1),
        "numpy": lambda: weight.detach().numpy().fill(3),
        "replaced": replaced,
        "a schedule": schedule.step,
        "a number": lambda: extra.update(epoch=2),
        "a list": lambda: extra["history"].append(0.4),
        "a tensor in a dict": lambda: extra["table"].fill_(1),
        "a new tensor": lambda: extra.update(table=torch.ones(3)),
        "a set": lambda: extra["names"].add("b"),
        "another key": lambda: extra.update(more=1),
        "moments": lambda: optimizer.state[weight]["momentum_buffer"].zero_(),  # noqa: PLW0108 - a restore makes it anew
        "a learning rate": lambda: optimizer.param_groups[0].update(lr=0.5),
    }


CHANGES = list(everything()[1])


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "under way"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_a_step_that_is_saved_again_with_another_state_is_an_error(change: str, durable: bool) -> None:
    state, changes = everything()
    store = HeldStore(held=not durable)
    with open_on(store, state) as ckpt:
        first = ckpt.save_now(1)
        ckpt.fence()
        if durable:
            first.wait(SHORT_S)
        torch.rand(3)  # generators apart
        assert ckpt.save_now(1).step == 1
        changes[change]()
        with pytest.raises(SaveError, match="step 1 has been saved or restored, and the state has changed since"):
            ckpt.save_now(1)
        store.open.set()
        ckpt.save_now(2).wait(SHORT_S)
    assert committed(store) == [1, 2]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a loader"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_a_restored_step_is_not_saved_again_with_another_state(change: str, beside: bool) -> None:
    def make() -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
        state, changes = everything()
        return ({**state, "loader": Loader()} if beside else state), changes

    store = MemoryStore()
    with open_on(store, make()[0]) as ckpt:
        first = ckpt.save_now(1).wait(SHORT_S)
    state, changes = make()
    with open_on(store, state) as ckpt:
        ckpt.restore()
        torch.rand(3)
        assert not beside or state["loader"].asked == 0
        assert ckpt.save_now(1).wait(SHORT_S) == first
        changes[change]()
        with pytest.raises(SaveError, match="step 1 has been saved or restored, and the state has changed since"):
            ckpt.save_now(1)
        ckpt.save_now(2).wait(SHORT_S)
    assert committed(store) == [1, 2]


class Loader:
    """Starts workers when it is asked for its state, as those of some libraries do."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {"at": torch.ones(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return iter(())


def test_a_step_that_is_saved_again_unchanged_is_that_save() -> None:
    """The loop of the README: a step that was due, then the end of the loop."""
    store = MemoryStore()
    state, changes = everything()
    with open_on(store, state, every=Every(steps=1)) as ckpt:
        for step in (1, 2, 3):
            changes["a step"]()
            ckpt.step(step)
            ckpt.wait()
            handle = ckpt.save_now(step)
            assert handle.wait(SHORT_S) == ckpt._engine.queue.last_commit
            assert ckpt.save_now(step).wait(SHORT_S) == handle.wait()
        assert ckpt.stats.saves == 3


def test_metrics_that_come_too_late_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with open_on(MemoryStore(), {"t": torch.ones(3)}) as ckpt:
        ckpt.save_now(1, metrics={"loss": 0.5}).wait(SHORT_S)
        ckpt.save_now(1, metrics={"loss": 0.5}).wait(SHORT_S)
        assert not caplog.records
        ckpt.save_now(1, metrics={"val_loss": 0.4}).wait(SHORT_S)
    assert "val_loss" in caplog.text


def test_what_failed_is_made_by_the_second_call() -> None:
    store = HeldStore()
    state, changes = everything()
    with open_on(store, state) as ckpt:
        store.failing = StoreUnavailableError
        with pytest.raises(StoreUnavailableError):
            ckpt.save_now(1).wait(SHORT_S)
        store.failing = None
        with pytest.raises(StoreUnavailableError):
            ckpt.wait(SHORT_S)
        changes["in place"]()
        assert ckpt.save_now(1).wait(SHORT_S).save.attempt == 1
    assert committed(store) == [1]


def test_a_restored_step_is_saved_again_only_if_nothing_was_trained() -> None:
    store, job = MemoryStore(), Job(2)
    with open_on(store, job.state) as ckpt:
        for step in (1, 2):
            job.step()
            ckpt.save_now(step).wait(SHORT_S)
        assert ckpt.restore(step=1) == 1
        assert ckpt.save_now(1).wait(SHORT_S).save.step == 1
        job.step()
        with pytest.raises(SaveError, match="restored"):
            ckpt.save_now(1)
        assert ckpt.restore(step=1) == 1
        assert ckpt.save_now(1).wait(SHORT_S).save.step == 1
