"""Training steps that are captured as a graph and replayed: no Python runs then, and so no hook that could fence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt.errors import SaveError
from fastckpt.options import Options
from fastckpt.snapshot import FenceHooks
from fastckpt.snapshot import snapshot as engine
from fastckpt.snapshot.copier import Copier
from fastckpt.snapshot.side_stream import SideStream, wait_for
from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu.suite.models import inputs
from tests.fakegpu.suite.tools import OPTIONS, Saved, train
from tests.gpu.machines import FAKE, Machine
from tests.gpu.test_snapshots import UNVERIFIED, late_copies
from tests.gpu.tools import train_kept, wrong_steps

pytestmark = pytest.mark.gpu

WARM_UP = 2


@pytest.fixture(autouse=True)
def captures_can_be_seen(machine: Machine) -> None:
    if machine.name == FAKE and not hasattr(torch.Stream, "is_capturing"):
        pytest.skip(f"torch {torch.__version__} asks only CUDA whether a stream is captured (since 2.13 any device)")


class Captured:
    """A whole step: forward, backward and a capturable optimizer. Ordinary in the first steps, then captured, from then on replayed."""

    def __init__(
        self, machine: Machine, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
    ) -> None:
        """before, after: called while capturing, before and after the work."""
        where = machine.device
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 600), nn.GELU(), nn.Linear(600, 600), nn.GELU(), nn.Linear(600, 8)).to(
            where
        )
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=1e-2, capturable=True)
        self.state = {"model": self.model, "optim": self.optim}
        self.x = torch.zeros(16, 32, device=where)
        self._machine, self._before, self._after = machine, before, after
        self._side = torch.Stream(device=where)
        self.replay: Callable[[], None] | None = None

    def _work(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optim.step()

    def _captured_work(self) -> None:
        self._before()
        self._work()
        self._after()

    def step(self, number: int) -> None:
        self.x.copy_(inputs(number, 16, 32).to(self.x.device))
        if number <= WARM_UP:  # beside the stream that trains, as torch asks for it
            now = torch.accelerator.current_stream(self.x.device)
            self._side.wait_stream(now)
            with self._side:
                self.optim.zero_grad(set_to_none=True)
                self._work()
            now.wait_stream(self._side)
            return
        if self.replay is None:
            self.optim.zero_grad(
                set_to_none=True
            )  # gradients that are made while capturing have their place in the graph's memory
            self.replay = self._machine.capture(self._captured_work)
        self.replay()


class Seen(Checkpointer):
    """The last one that was made, and whether its hooks were trusted at each save."""

    last: Seen
    trusted: list[bool]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Seen.last, self.trusted = self, []

    def save_now(self, step: int, **kwargs: Any) -> Any:
        self.trusted.append(self._engine.fence.hooks.can_be_trusted)
        return super().save_now(step, **kwargs)


def run(machine: Machine, captured: Captured, options: Options = OPTIONS, steps: int = 7) -> Saved:
    # In the model, what was allocated while capturing is not kept for the graph, so copies that are made later may lie in it.
    how = train if machine.name == FAKE else train_kept
    return how(captured.state, captured.step, steps=steps, options=options, checkpointer=Seen)


def test_a_captured_step_with_saves_between(machine: Machine) -> None:
    """The save before the capture is still to be fenced when the hook fires in it."""
    assert not wrong_steps(run(machine, Captured(machine)))
    assert Seen.last.trusted[:WARM_UP] == [True] * WARM_UP
    assert not any(Seen.last.trusted[WARM_UP:]), (
        "a hook that fired while capturing says nothing about the steps after it"
    )


def test_late_copies_of_replayed_steps(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    late_copies(machine, monkeypatch)
    assert not wrong_steps(run(machine, Captured(machine), UNVERIFIED))


def test_if_hooks_were_trusted_nevertheless_it_would_show(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    late_copies(machine, monkeypatch)
    monkeypatch.setattr(FenceHooks, "can_be_trusted", True)
    wrong = wrong_steps(run(machine, Captured(machine), UNVERIFIED))
    assert machine.problems() or wrong


def test_a_graph_that_is_older_than_the_checkpointer(machine: Machine) -> None:
    captured = Captured(machine)
    for number in range(1, WARM_UP + 2):
        captured.step(number)
    first, captured.step = captured.step, lambda number: first(WARM_UP + 1 + number)  # type: ignore[method-assign]
    assert not wrong_steps(run(machine, captured))
    assert not any(Seen.last.trusted)


def test_a_save_while_capturing_is_refused(machine: Machine) -> None:
    refused: list[SaveError] = []

    def save() -> None:
        with pytest.raises(SaveError, match="being captured") as caught:
            Seen.last.save_now(WARM_UP + 1)
        refused.append(caught.value)

    assert not wrong_steps(run(machine, Captured(machine, after=save)))
    assert len(refused) == 1


@pytest.mark.parametrize("ring", [False, True], ids=["whole", "ring"])
def test_a_save_that_is_encoded_while_a_graph_is_captured(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, ring: bool
) -> None:
    """All that another thread does for a save, done during a capture: by default a capture is lost if any thread of the process asks for an
    event in the usual way, or takes memory from the device.
    """
    capturing, rings = threading.Event(), []
    raw, start = engine.Snapshot.raw, Copier.start

    def held_back(snapshot: engine.Snapshot, number: int, scratch: Any) -> Any:
        if snapshot._progress.step == WARM_UP:
            assert capturing.wait(60)
        return raw(snapshot, number, scratch)

    def started(copier: Copier, *arguments: Any) -> bool:
        looked = start(copier, *arguments)
        if copier._progress.step == WARM_UP:
            rings.append(copier.n_waiting > 0)
        return looked

    def until_durable() -> None:
        Seen.last._engine.queue.wait_idle(60)

    monkeypatch.setattr(engine.Snapshot, "raw", held_back)
    monkeypatch.setattr(Copier, "start", started)
    captured = Captured(machine, before=capturing.set, after=until_durable)
    options = Options(threads=1, connections=1, host_budget_bytes=(24 if ring else 256) << 20, max_stall_s=60)
    if ring:
        more = nn.Linear(1100, 1100).to(machine.device)  # 4.8 MB, with its moments 14.5
        captured.optim.add_param_group({"params": more.parameters()})
        captured.state["more"] = more
        plain = captured._work

        def both() -> None:
            more(more.weight[:16]).square().mean().backward()
            plain()

        captured._work = both  # type: ignore[method-assign]
    assert not wrong_steps(run(machine, captured, options))
    assert rings == [ring]


def test_another_thread_waits_for_an_event_while_a_graph_is_captured(machine: Machine) -> None:
    """The same in small: what `wait_for` has to do for it."""
    side, x = SideStream(machine.device), torch.zeros(4096, device=machine.device)
    side.begin()
    event = side.mark()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            wait_for(event)
            wait_for(side.mark())
        except BaseException as error:
            errors.append(error)

    def work() -> None:
        x.add_(1)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        x.add_(1)

    replay = machine.capture(work)
    x.zero_()
    replay()
    assert not errors
    assert x.cpu().eq(2).all()
