"""SIGTERM to a whole process group, as SLURM, systemd and `timeout` send it: DataLoader workers die with it, and torch raises in training.

Children are forked, each a group of its own. Their state has all that could give an update under way away: statistics, dropout's
generators, momenta, parameters one after another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import platform
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Every, Options, RNGState

RESULT = Path(__file__).parent / "results" / "signal_to_group.json"
WORKERS = (0, 2, 8)
N_SAMPLES = 2000
LAST_STEP = N_SAMPLES // 4
PLACES = ("data", "forward", "backward", "optimizer", "updated", "save")
PLEASE = (1 << 32) - 1
"""Reported instead of a step: send the signal now. By another process: workers that their parent ends leave without an error."""
OUTLIVED_S = 60.0  # what a child may take: the grace is 30


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children have none of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Visit = Callable[[str], None]


class OneByOne(torch.optim.Optimizer):
    """Momentum, parameter by parameter, and slow enough for another process to die meanwhile."""

    def __init__(self, parameters: Any, visit: Visit) -> None:
        super().__init__(parameters, {})
        self._visit = visit

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                if number == 1:
                    self._visit("optimizer")
                for _ in range(20):
                    parameter.add_(momentum, alpha=-0.0005)


class Capturing:
    """Its state is asked for in the middle of a save."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit

    def state_dict(self) -> dict[str, Any]:
        self._visit("save")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Training:
    def __init__(self, visit: Visit = lambda place: None) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        self.visit = visit
        layers = [torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 4)]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = OneByOne(self.model.parameters(), visit)
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "capturing": Capturing(visit),
            "rng": RNGState(),
        }

    def batches(self, workers: int) -> Iterator[torch.Tensor]:
        data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, N_SAMPLES * 8).reshape(N_SAMPLES, 8))
        context = "fork" if workers else None
        loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context=context)
        self.visit("data")
        for (batch,) in loader:
            yield batch
            self.visit("data")

    def step(self, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.visit("forward")
        loss = self.model(batch).square().mean()
        self.visit("backward")
        loss.backward()
        self.optimizer.step()
        self.visit("updated")

    def digest(self) -> str:
        parts = [*self.model.state_dict().values(), *(s["momentum"] for s in self.optimizer.state.values())]
        rng = RNGState().state_dict()
        parts += [rng["torch"], rng["python"]["words"], rng["numpy"]["words"]]
        return hashlib.sha256(pickle.dumps([part.tolist() for part in parts])).hexdigest()


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """The state after each step of a run that nobody ends."""
    training = Training()
    found = [training.digest()]
    for batch in training.batches(0):
        training.step(batch)
        found.append(training.digest())
    return found


def any_child_lives() -> bool:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" for pid in pids)


def job(url: Path, workers: int, report: Callable[[int], object], place: str | None, at_step: int) -> None:
    """A training script. It asks for the signal at a place, or gets it at any time."""
    here, told = [0], [False]

    def visit(reached: str) -> None:
        if reached == place and here[0] >= at_step and not told[0]:
            told[0] = True
            report(PLEASE)
            deadline = time.monotonic() + OUTLIVED_S
            while (ckpt.notice is None or any_child_lives()) and time.monotonic() < deadline:
                pass  # so that the ends of the workers are told right here

    training = Training(visit)
    options = Options(threads=1, connections=1)
    with Checkpointer(url, training.state, every=Every(steps=7), spot="signal", options=options) as ckpt:
        assert ckpt.restore() == 0
        for step, batch in enumerate(training.batches(workers), 1):
            here[0] += 1
            training.step(batch)
            if ckpt.step(step):
                break
            report(step)
    raise SystemExit(ckpt.exit_code)


class Child:
    """One run in a process group of its own."""

    def __init__(self, folder: Path, workers: int, place: str | None, at_step: int) -> None:
        self._reading, writing = os.pipe()
        self.log = folder / "log"
        self.pid = os.fork()
        if self.pid == 0:
            code = 98
            try:
                os.setpgid(0, 0)
                os.close(self._reading)
                sys.stderr = self.log.open("w", buffering=1)
                logging.basicConfig(stream=sys.stderr, force=True)
                warnings.simplefilter("ignore")  # eight workers are more than this machine has cores
                job(folder / "run", workers, lambda step: os.write(writing, step.to_bytes(4, "little")), place, at_step)
                code = 99
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 97
            except BaseException:
                traceback.print_exc()
                code = 1
            finally:
                os._exit(code)
        os.close(writing)
        self.last = 0

    def read(self) -> int | None:
        """Wait for the next report. None: the pipe's other end has gone, workers' too."""
        piece = os.read(self._reading, 4)  # each is written as a whole
        if not piece:
            return None
        said = int.from_bytes(piece, "little")
        if said != PLEASE:
            self.last = said
        return said

    def end(self) -> int:
        """How it ended. Whatever is left of its group goes too."""
        deadline = time.monotonic() + OUTLIVED_S
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = found[1] if found[0] else os.waitpid(self.pid, 0)[1]
        while self.read() is not None:
            pass
        os.close(self._reading)
        return os.waitstatus_to_exitcode(status)


def judge(folder: Path, child: Child, undisturbed: list[str]) -> str:
    """Which step stands: "last" or "under way". Fails unless the promises were kept."""
    code = child.end()
    words = child.log.read_text(errors="replace")
    assert code == fastckpt.EXIT_CODE_NOTICE, f"exit {code}:\n{words}"
    training = Training()
    options = Options(threads=1, connections=1)
    with Checkpointer(folder / "run", training.state, spot=None, options=options) as ckpt:
        step = ckpt.restore()
        assert step >= child.last, f"step {child.last} had ended, {step} was restored:\n{words}"
        assert training.digest() == undisturbed[step], f"step {step} is not that of an undisturbed run:\n{words}"
    return "under way" if step > child.last else "last"


def run_moments(tmp_path: Path, undisturbed: list[str], moments: int, workers: int, seed: int) -> dict[str, int]:
    """Half of them at a place in the code, half whenever it happens. How often the step under way could be kept, too."""
    rng = random.Random(seed * 100 + workers)
    outcomes = {"last": 0, "under way": 0}
    for number in range(moments):
        folder = tmp_path / f"{workers}-{number}"
        folder.mkdir()
        place = ("optimizer" if number == 0 else rng.choice(PLACES)) if number % 2 == 0 else None
        child = Child(folder, workers, place, rng.randint(2, 20))
        while (said := child.read()) != (1 if place is None else PLEASE):
            assert said is not None, child.log.read_text(errors="replace")
        if place is None:
            time.sleep(rng.uniform(0, 0.15))  # the moment, no synchronisation
        os.killpg(child.pid, signal.SIGTERM)
        outcomes[judge(folder, child, undisturbed)] += 1
    return outcomes


@pytest.mark.parametrize("workers", WORKERS)
def test_a_signal_to_the_group_saves_what_there_is(tmp_path: Path, undisturbed: list[str], workers: int) -> None:
    """Up to 10 s: three runs, with up to 8 workers each."""
    seed = random.SystemRandom().randrange(1 << 32)  # the global generator is the training's
    print("seed", seed)
    run_moments(tmp_path, undisturbed, 3, workers, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_signal_to_the_group_at_50_moments(tmp_path: Path, undisturbed: list[str]) -> None:
    """Minutes: 150 runs."""
    seed = random.SystemRandom().randrange(1 << 32)  # the global generator is the training's
    print("seed", seed)
    outcomes = {str(workers): run_moments(tmp_path, undisturbed, 50, workers, seed) for workers in WORKERS}
    versions = {"fastckpt": fastckpt.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "seed": seed,
        "moments_each": 50,
        "exit_code": fastckpt.EXIT_CODE_NOTICE,
        "steps_that_had_ended_and_were_lost": 0,
        "restored_by_workers": outcomes,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
