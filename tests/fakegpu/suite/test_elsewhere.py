"""An optimizer's step in another thread or on another stream while a snapshot is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastckpt.errors import TornSnapshotError
from fastckpt.snapshot import snapshot as engine
from tests.fakegpu.suite.models import Job, inputs
from tests.fakegpu.suite.run import RING, SHORT_S, Run, small


def in_thread(call: Callable[[], None]) -> None:
    """Run it to its end in another thread, whose current streams are the default ones. Raises what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(SHORT_S)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def test_a_step_from_another_thread_on_another_stream_is_held_back_there(gpu: torch.device) -> None:
    """The training thread computes on a stream of its own, the other thread's is the default one; they are ordered by events."""
    own, default = torch.Stream(device=gpu), torch.accelerator.current_stream(gpu)

    def make(where: torch.device) -> Job:
        job = small(where)
        model, optim = job.state["model"], job.state["optim"]
        own.wait_stream(default)

        def update() -> None:
            default.wait_stream(own)
            optim.step()
            own.wait_stream(default)

        def step(number: int) -> None:
            with own:
                model(inputs(number, 16, 32).to(where)).square().mean().backward()
                in_thread(update)
                optim.zero_grad(set_to_none=False)

        return Job(job.state, step)

    run = Run(gpu, make)
    with own:
        run.train_and_save().wait(SHORT_S)
        run.train_and_save()
        assert run.ckpt._engine.fence.hooks is not None
        run.step()
        assert run.ckpt._engine.fence.hooks.can_be_trusted
        run.check(1, 2)


def two_streams(where: torch.device, elsewhere: Callable[[Callable[[], None]], None] = lambda call: call()) -> Job:
    """Two models, each updated on a stream of its own: nothing orders the one update with the other."""
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(600, 600).to(where) for _ in range(2))
    optims = [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9) for model in (first, second)]
    side, main = torch.Stream(device=where), torch.accelerator.current_stream(where)

    def step(number: int) -> None:
        x = inputs(number, 16, 600).to(where)
        (first(x).square().mean() + second(x).square().mean()).backward()
        side.wait_stream(main)

        def update() -> None:
            with side:
                optims[0].step()

        elsewhere(update)
        optims[1].step()
        main.wait_stream(side)
        for optim in optims:
            optim.zero_grad(set_to_none=False)

    return Job({"first": first, "second": second, "one": optims[0], "other": optims[1]}, step)


@pytest.mark.parametrize("elsewhere", [lambda call: call(), in_thread], ids=["same_thread", "other_thread"])
def test_every_stream_that_updates_is_held_back(
    gpu: torch.device, elsewhere: Callable[[Callable[[], None]], None]
) -> None:
    run = Run(gpu, lambda where: two_streams(where, elsewhere))
    for _ in range(3):
        run.train_and_save()
    run.check(1, 2, 3)


def test_a_step_waits_while_another_threads_step_is_in_the_fence(
    late: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring turns as slowly as its store takes packs. Both optimizers' steps must wait, not only that which came first."""
    entered = threading.Event()
    fence = engine.Snapshot.fence

    def told(self: engine.Snapshot, *arguments: Any) -> None:
        entered.set()
        fence(self, *arguments)

    def make(where: torch.device) -> Job:
        torch.manual_seed(0)
        models = [torch.nn.Linear(1100, 1100).to(where) for _ in range(2)]
        optims = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]

        def step(number: int) -> None:
            x = inputs(number, 2, 1100).to(where)
            sum(model(x).square().mean() for model in models).backward()
            # The default stream, for both.
            thread = threading.Thread(target=optims[0].step)
            thread.start()
            if threading.current_thread() is waiting_thread and not store.open.is_set():
                assert entered.wait(SHORT_S)
                threading.Timer(0.2, store.open.set).start()
                optims[1].step()
                waited.append(store.open.is_set())
            else:
                thread.join(SHORT_S)
                optims[1].step()
            thread.join(SHORT_S)
            assert not thread.is_alive()
            for optim in optims:
                optim.zero_grad(set_to_none=False)

        return Job({"a": models[0], "b": models[1], "one": optims[0], "other": optims[1]}, step)

    waiting_thread, waited = threading.current_thread(), list[bool]()
    run = Run(late, make, options=RING)
    store = run.store
    run.train_and_save().wait(SHORT_S)
    run.step()
    store.open.clear()
    run.save()
    monkeypatch.setattr(engine.Snapshot, "fence", told)
    with contextlib.suppress(TornSnapshotError):  # what `waited` and the checkpoints say is what counts
        run.step()
        run.ckpt.wait(SHORT_S)
    assert waited == [True], "the second step went on while the first was still waiting for the copies"
    run.check(1, 2)
