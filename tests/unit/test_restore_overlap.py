"""restore(overlap=True): what is there when it returns, what waits for the rest, and what happens if the rest cannot come."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer, Options, RNGState
from fastckpt.errors import CorruptCheckpointError, NoCheckpointError, PartialRestoreError, SaveError, StoreError
from fastckpt.repository.commit import open_vote
from fastckpt.training.arrival import Arrival
from tests.support.repositories import flip, keys_of, living, save_ranks
from tests.support.straight import ReadStore, all_straight, place_of, plain

OPTIONS = Options(threads=1, connections=1)


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    all_straight(monkeypatch)


def made(seed: int, *, steps: int, first: str = "m", width: int = 64) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {first: model, "o": optimizer, "s": schedule, "rng": RNGState()}
    for _ in range(steps):
        forward(state, first)
        optimizer.step()
        schedule.step()
    return state


def forward(state: dict[str, Any], name: str = "m") -> float:
    state["o"].zero_grad()
    loss = state[name](torch.randn(8, 16)).pow(2).mean()
    loss.backward()
    return loss.item()


def held_back() -> bool:
    """Whether this reads for an arrival: on its own thread, or on one of those that read ahead for it."""
    return any(thread.name == "fastckpt-arrival" for thread in threading.enumerate())


class Saved:
    """Step 1 of a training, in a store that holds back what comes later."""

    def __init__(self, **kind: Any) -> None:
        self.store = ReadStore()
        state, first = made(1, steps=2, **kind), kind.get("first", "m")
        with self.opened(state) as ckpt:
            ckpt.save_now(1).wait()
            self.held = plain(copy.deepcopy({key: one for key, one in state.items() if key != "rng"}))
            self.losses = [self._step(state, first) for _ in range(3)]

    @staticmethod
    def _step(state: dict[str, Any], name: str) -> float:
        loss = forward(state, name)
        state["o"].step()
        state["s"].step()
        return loss

    def hold(self) -> None:
        """From now on what comes later waits."""
        self.store.open.clear()
        self.store.waits = held_back

    def opened(self, state: dict[str, Any]) -> Checkpointer:
        return Checkpointer(self.store, state, every=None, spot=None, options=OPTIONS)


@pytest.fixture
def saved() -> Saved:
    return Saved()


@pytest.fixture
def let_come(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> Saved:
    """What is held back comes as soon as somebody waits for it."""
    wait = Arrival.wait

    def watched(self: Arrival) -> None:
        saved.store.open.set()
        wait(self)

    monkeypatch.setattr(Arrival, "wait", watched)
    saved.hold()
    return saved


def is_coming(ckpt: Checkpointer) -> bool:
    return ckpt._engine.fence.hooks.arriving is not None


@pytest.mark.parametrize("first", ["m", "z"])  # a module's name before and after that of the optimizer
@pytest.mark.parametrize("steps", [0, 1])
def test_less_than_two_fifths_are_read_when_it_returns(first: str, steps: int) -> None:
    kind: dict[str, Any] = {"first": first, "width": 2048}
    saved = Saved(**kind)
    with saved.opened(made(2, steps=steps, **kind)) as ckpt:
        saved.store.read_bytes = 0
        ckpt.restore()
        plainly = saved.store.read_bytes
    saved.hold()
    state = made(3, steps=steps, **kind)
    ckpt = saved.opened(state)
    saved.store.read_bytes = 0
    assert ckpt.restore(overlap=True) == 1
    assert saved.store.read_bytes <= 0.4 * plainly
    assert is_coming(ckpt)
    assert plain(state[first]) == saved.held[first]
    assert plain(state["s"]) == saved.held["s"]
    assert state["o"].param_groups[0]["lr"] == saved.held["o"]["param_groups"][0]["lr"]
    saved.store.open.set()
    ckpt.fence()
    assert plain(state["o"]) == saved.held["o"]
    ckpt.close()


@pytest.mark.parametrize("steps", [0, 1])
def test_training_goes_on_as_if_nothing_had_been(let_come: Saved, steps: int) -> None:
    state = made(2, steps=steps)
    with let_come.opened(state) as ckpt:
        ckpt.restore(overlap=True)
        assert [let_come._step(state, "m") for _ in range(3)] == let_come.losses
        assert not is_coming(ckpt)
        ckpt.save_now(4).wait()


WAITERS: dict[str, Callable[[Checkpointer], object]] = {
    "fence": lambda ckpt: ckpt.fence(),
    "step": lambda ckpt: ckpt.step(1),
    "save_now": lambda ckpt: ckpt.save_now(2).wait(),
    "wait": lambda ckpt: ckpt.wait(),
    "close": lambda ckpt: ckpt.close(),
}


@pytest.mark.parametrize("waiter", WAITERS)
def test_what_waits_for_it(let_come: Saved, waiter: str) -> None:
    state = made(2, steps=0)
    with let_come.opened(state) as ckpt:
        ckpt.restore(overlap=True)
        WAITERS[waiter](ckpt)
        assert not is_coming(ckpt)
    assert plain(state["o"]) == let_come.held["o"]


def test_the_claim_comes_last(let_come: Saved) -> None:
    epochs = keys_of(let_come.store, "epochs/")
    with let_come.opened(made(2, steps=0)) as ckpt:
        ckpt.restore(overlap=True)
        assert keys_of(let_come.store, "epochs/") == epochs
        ckpt.fence()
        assert len(keys_of(let_come.store, "epochs/")) == len(epochs) + 1


def test_a_checkpoint_that_comes_meanwhile(let_come: Saved) -> None:
    state = made(2, steps=0)
    with let_come.opened(state) as ckpt:
        ckpt.restore(overlap=True)
        save_ranks(let_come.store, 1, 2, [{key: one.state_dict() for key, one in made(5, steps=1).items()}])
        with pytest.raises(PartialRestoreError, match="newer checkpoint"):
            ckpt.fence()
        assert ckpt.restore(overlap=True) == 2
        state["o"].step()
        ckpt.save_now(3).wait()


@pytest.mark.parametrize("cause", [StoreError, CorruptCheckpointError])
def test_a_failure_is_raised_before_the_first_update(saved: Saved, cause: type[Exception]) -> None:
    state = made(2, steps=0)
    if cause is CorruptCheckpointError:
        flip(saved.store, *place_of(saved.store, 1, "o.state.3.exp_avg"))
    ckpt = saved.opened(state)
    saved.hold()
    ckpt.restore(overlap=True)
    if cause is StoreError:
        saved.store.fails_at = 0
    saved.store.open.set()
    forward(state)
    before = plain(copy.deepcopy(list(state["m"].parameters())))
    for call in (state["o"].step, state["o"].step, lambda: ckpt.step(2), lambda: ckpt.save_now(2), ckpt.fence):
        with pytest.raises(PartialRestoreError) as caught:
            call()
        assert isinstance(caught.value.__cause__, cause)
    assert plain(list(state["m"].parameters())) == before
    assert len(keys_of(saved.store, "epochs/")) == 1, "nothing was claimed"
    if cause is StoreError:
        saved.store.fails_at = None
        assert ckpt.restore(overlap=True) == 1
        state["o"].step()
        ckpt.save_now(2).wait()
        ckpt.close()
    else:
        with pytest.raises(PartialRestoreError):
            ckpt.close()


def test_a_fork_does_not_train_with_what_never_comes(let_come: Saved) -> None:
    state = made(2, steps=0)
    with let_come.opened(state) as ckpt:
        ckpt.restore(overlap=True)
        arrival = ckpt._restoring._arrival
        assert arrival is not None
        arrival._pid += 1
        with pytest.raises(PartialRestoreError, match="fork"):
            state["o"].step()
        arrival._pid -= 1
        state["o"].step()


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_waits_though_the_checkpointer_is_gone(saved: Saved, fails: bool) -> None:
    state = made(2, steps=0)
    saved.hold()
    saved.opened(state).restore(overlap=True)
    if fails:
        saved.store.fails_at = 0
    saved.store.open.set()
    for thread in threading.enumerate():
        if thread.name == "fastckpt-arrival":
            thread.join()
    gc.collect()
    if not fails:
        assert [saved._step(state, "m") for _ in range(3)] == saved.losses
        return
    forward(state)
    with pytest.raises(PartialRestoreError):
        state["o"].step()


def test_whoever_asks_an_optimizer_for_its_state_gets_it_whole(let_come: Saved) -> None:
    state = made(2, steps=0)
    with let_come.opened(state) as ckpt:
        ckpt.restore(overlap=True)
        assert plain(copy.deepcopy(state["o"].state_dict())) == let_come.held["o"]


class LookingAhead(torch.optim.SGD):
    """Uses its state before it calls the closure."""

    def step(self, closure: Any = None) -> Any:
        self.seen = [one["momentum_buffer"].clone() for one in self.state.values()]
        return super().step(closure)


def test_an_optimizer_of_ones_own_gets_its_state_before_a_closure_runs(let_come: Saved) -> None:
    state = made(2, steps=0)
    del state["s"]
    state["o"] = optimizer = LookingAhead(state["m"].parameters(), lr=0.01, momentum=0.9)
    let_come.store.waits = lambda: False
    with Checkpointer(let_come.store, state, every=None, spot=None, fresh=True, options=OPTIONS) as ckpt:
        forward(state)
        super(LookingAhead, optimizer).step()
        ckpt.save_now(1).wait()
        held = [one["momentum_buffer"].clone() for one in optimizer.state.values()]
        let_come.hold()
        ckpt.restore(1, overlap=True)
        assert is_coming(ckpt)
        optimizer.step(lambda: torch.tensor(forward(state)))
    assert all(map(torch.equal, optimizer.seen, held))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_change_before_all_has_come_is_seen_by_a_save_of_the_same_step(let_come: Saved, overlap: bool) -> None:
    state = made(2, steps=0)
    with let_come.opened(state) as ckpt:
        ckpt.restore(overlap=overlap)
        with torch.no_grad():
            state["m"][0].weight.zero_()
        with pytest.raises(SaveError, match="has changed since"):
            ckpt.save_now(1)


def test_without_a_change_a_save_of_the_same_step_is_there_already(let_come: Saved) -> None:
    with let_come.opened(made(2, steps=0)) as ckpt:
        ckpt.restore(overlap=True)
        assert ckpt.save_now(1).wait().save.step == 1


def test_an_exception_in_the_first_pass_waits_for_nothing(saved: Saved) -> None:
    saved.hold()
    with pytest.raises(ZeroDivisionError), saved.opened(made(2, steps=0)) as ckpt:  # noqa: PT012
        ckpt.restore(overlap=True)
        saved.store.waits = lambda: False
        saved.store.open.set()
        raise ZeroDivisionError
    assert not any(thread.name == "fastckpt-arrival" for thread in threading.enumerate())


def test_an_exception_does_not_wait_for_a_store_that_does_not_answer(
    saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    saved.hold()
    ckpt = Checkpointer(saved.store, made(2, steps=0), every=None, spot=None, close_timeout_s=0.01, options=OPTIONS)
    with pytest.raises(ZeroDivisionError), ckpt:  # noqa: PT012
        ckpt.restore(overlap=True)
        raise ZeroDivisionError
    assert held_back()
    assert "must not be trained" in caplog.text
    claimed = keys_of(saved.store, "epochs/")
    saved.store.open.set()
    for thread in threading.enumerate():
        if thread.name == "fastckpt-arrival":
            thread.join()
    assert keys_of(saved.store, "epochs/") == claimed


class Halving(torch.optim.AdamW):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for one in self.state.values():
            one["exp_avg"] /= 2


def double(optimizer: torch.optim.Optimizer) -> None:
    for one in optimizer.state.values():
        one["exp_avg"] *= 2


def hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_load_state_dict_post_hook(double)
    return optimizer


ODD: dict[str, Callable[[nn.Module], Any]] = {
    "its own load_state_dict": lambda model: Halving(model.parameters()),
    "a hook": lambda model: hooked(torch.optim.AdamW(model.parameters())),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_optimizer_that_looks_at_its_state_gets_it_first(saved: Saved, kind: str) -> None:
    found = []
    for overlap in (True, False):
        state = made(2, steps=0)
        state["o"] = ODD[kind](state["m"])
        state["s"] = torch.optim.lr_scheduler.StepLR(state["o"], 1)
        with saved.opened(state) as ckpt:
            ckpt.restore(overlap=overlap)
            assert not is_coming(ckpt)
        found.append(plain({key: state[key] for key in "mo"}))
    assert found[0] == found[1]


def test_parameters_of_another_type_take_their_state_first(saved: Saved) -> None:
    found = []
    for overlap in (True, False):
        state = made(2, steps=0)
        state["m"].to(torch.bfloat16)
        with saved.opened(state) as ckpt:
            ckpt.restore(overlap=overlap)
        found.append(plain({key: state[key] for key in "mo"}))
    assert found[0] == found[1]


def test_where_nothing_is_left_to_come(saved: Saved) -> None:
    with Checkpointer(saved.store, made(2, steps=0), every=None, spot=None, read_only=True) as ckpt:
        assert ckpt.restore(overlap=True) == 1
        assert not is_coming(ckpt)
    with Checkpointer(ReadStore(), made(2, steps=0), every=None, spot=None) as ckpt:
        assert ckpt.restore(overlap=True) == 0
        ckpt.save_now(1).wait()


def test_what_cannot_be_asked_for_together(saved: Saved) -> None:
    with saved.opened(made(2, steps=0)) as ckpt:
        with pytest.raises(ValueError, match="latest-valid"):
            ckpt.restore("latest-valid", overlap=True)
        with pytest.raises(ValueError, match="atomic"):
            ckpt.restore(atomic=True, overlap=True)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_restore_before_all_has_come(saved: Saved, is_there: bool) -> None:
    state = made(2, steps=0)
    saved.hold()
    with saved.opened(state) as ckpt:
        ckpt.restore(overlap=True)
        arrival = ckpt._restoring._arrival
        assert arrival is not None
        saved.store.open.set()
        if is_there:
            arrival._is_over.wait()
        with pytest.raises(NoCheckpointError):
            ckpt.restore(7)
        assert not is_coming(ckpt)
        if is_there or arrival.error is None:  # what it was given up in the middle of may just have come
            ckpt.save_now(2).wait()
        assert ckpt.restore(1, overlap=True) == 1
        assert ckpt.restore(1) == 1
        ckpt.save_now(3).wait()


def test_packs_hold_the_state_of_optimizers_last() -> None:
    """Whatever the names are."""
    saved = Saved(first="z")
    (commit,) = living(saved.store).values()
    reader = open_vote(saved.store, commit.vote(0))
    names = ["".join(reader.tensors_of(chunk)) for chunk in range(len(reader.records))]
    of_optimizer = ["o.state." in name for name in names]
    assert any(of_optimizer)
    assert of_optimizer == sorted(of_optimizer)
