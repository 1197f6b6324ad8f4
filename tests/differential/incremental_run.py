"""A training run whose every checkpoint is compared with `torch.save` of the same moment, bit by bit: differences change no value.

    python -m tests.differential.incremental_run 300 tests/differential/results/incremental_run.json

What is trained has all that makes chunks alike and unlike: frozen parts that thaw, an embedding of which few rows change, bf16 copies of
masters, tensors of NaN with payloads, tied weights, names that differ only by their dots. Now and then a save fails, is asked for whole, an
optimizer is replaced, a module grows, a type changes, the process starts anew, or goes back.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastckpt
from fastckpt import Checkpointer, Keep, Options
from fastckpt.errors import CheckpointError, StoreError
from fastckpt.events import ChunkStored, Event
from fastckpt.format.repository_records import Commit
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from tests.support.host_training import MIB, SHORT_S
from tests.support.repositories import read


class Refusing(MemoryStore):
    """Refuses every write of what it is told to."""

    refused = ""

    def put(self, key: str, data: Any) -> None:
        if self.refused and self.refused in key:
            raise StoreError(f"{key}: refused, said the test")
        super().put(key, data)


class Model(torch.nn.Module):
    """Parts of about a megabyte, each a chunk or two of its own, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20_000, 16)
        self.frozen = torch.nn.Linear(16, 18_000)
        self.middle = torch.nn.Sequential(torch.nn.Linear(16, 900), torch.nn.ReLU(), torch.nn.Linear(900, 300))
        self.norm = torch.nn.BatchNorm1d(300)
        self.head = torch.nn.Linear(300, 16)
        self.frozen.requires_grad_(False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        x = self.words(numbers).mean(1)
        found: torch.Tensor = self.head(self.norm(self.middle(x))) + self.frozen(x)[:, :16]
        return found


class Run:
    """The objects of a process."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = Model()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=3e-4)
        nothing = torch.full((300_000,), 0x7FC0_1234, dtype=torch.int32)
        self.extra: dict[str, Any] = {
            "copy": self._copy(torch.bfloat16),
            "nan": nothing.view(torch.float32),
            "nan16": torch.full((700_000,), float("nan"), dtype=torch.bfloat16),
            "a.b": torch.zeros(300_000),
            "a": {"b": torch.ones(300_000)},
            "count": 0,
        }
        self.state = {"model": self.model, "optimizer": self.optimizer, "extra": self.extra, "rng": fastckpt.RNGState()}

    def _copy(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().to(dtype) for name, tensor in self.model.named_parameters()}

    def step(self, number: int) -> None:
        numbers = torch.randint(0, 40, (8, 4)) + number
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.999
        self.optimizer.zero_grad()
        self.model(numbers).square().mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                self.extra["copy"][name].copy_(tensor)
            self.extra["a.b"][number % self.extra["a.b"].numel()] += 1
        self.extra["count"] += 1

    # -- what becomes of a run -----------------------------------------------------------------------------------------

    def thaw(self) -> None:
        self.model.frozen.requires_grad_(True)
        self.optimizer.add_param_group({"params": list(self.model.frozen.parameters()), "lr": 1e-5})

    def faster(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 30

    def grow(self) -> None:
        self.model.add_module("later", torch.nn.Linear(300, 1_000))
        self.extra["copy"] |= {
            f"later.{name}": one.to(torch.bfloat16) for name, one in self.model.later.state_dict().items()
        }
        self.extra["new"] = torch.randn(400_000)

    def change_types(self) -> None:
        self.extra["copy"] = self._copy(torch.float16)
        self.extra["nan"] = self.extra["nan"].double()
        self.extra["a"]["b"] = torch.arange(600_000).reshape(3, -1)

    def begin_optimizer_again(self) -> None:
        """Its state is empty, as that of a new one."""
        self.optimizer.state.clear()

    def shrink(self) -> None:
        self.extra.pop("nan16")
        self.extra["a.b"] = torch.zeros(17)


CHANGES: tuple[Callable[[Run], None], ...] = (
    Run.thaw,
    Run.faster,
    Run.grow,
    Run.change_types,
    Run.begin_optimizer_again,
    Run.shrink,
)


@dataclass
class Seen:
    """What a run has come to."""

    steps: int = 0
    compared: int = 0
    failed_saves: int = 0
    restarts: int = 0
    rewinds: int = 0
    transforms: dict[str, int] = field(default_factory=dict)
    raw_bytes: int = 0
    stored_bytes: int = 0

    def look(self, event: Event) -> None:
        if isinstance(event, ChunkStored):
            self.transforms[event.transform] = self.transforms.get(event.transform, 0) + 1


def same(expected: Any, found: Any, where: str = "") -> list[str]:
    """Where two states differ, to the last bit."""
    if isinstance(expected, torch.Tensor):
        a, b = expected.detach(), found.detach() if isinstance(found, torch.Tensor) else None
        if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            return [where]
        alike = torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
        return [] if alike else [where]
    if isinstance(expected, dict):
        if not isinstance(found, dict) or list(expected) != list(found):
            return [f"{where}: keys"]
        return [one for key in expected for one in same(expected[key], found[key], f"{where}/{key}")]
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(expected) != len(found):
            return [f"{where}: length"]
        return [w for n, (a, b) in enumerate(zip(expected, found, strict=True)) for w in same(a, b, f"{where}/{n}")]
    return [] if expected == found else [where]


def by_torch(run: Run) -> bytes:
    plain = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "extra": run.extra}
    out = io.BytesIO()
    torch.save(plain, out)
    return out.getvalue()


class Story:
    """One run, with all that happens to it."""

    def __init__(self, n_steps: int, seed: int) -> None:
        self.n_steps, self.draw = n_steps, random.Random(seed)
        self.store, self.run, self.seen = Refusing(), Run(), Seen()
        self.kept: dict[int, bytes] = {}
        """What torch has saved of each step of the history."""
        self.form, self.forms = 0, dict[int, int]()
        """How often the run has changed its form; also by step. It goes back to its own form alone."""
        self.ckpt = self.opened()
        self.ckpt.restore()

    def opened(self) -> Checkpointer:
        options = Options(threads=2, connections=1, host_budget_bytes=512 * MIB)
        return Checkpointer(self.store, self.run.state, every=None, keep=Keep(last=4), spot=None, options=options)

    def tell(self) -> Seen:
        changes = {(n + 1) * self.n_steps // (len(CHANGES) + 1): change for n, change in enumerate(CHANGES)}
        gap = max(4, self.n_steps // 12)
        step = done = 0
        while done < self.n_steps:
            step, done = step + 1, done + 1
            self.run.step(step)
            if done in changes:
                changes[done](self.run)
                self.form += 1
            if done % 7 == 6:
                self.fail(step)
                step += 1
            self.save(step, full=done % 23 == 11)
            if done % gap == gap - 1:
                step = self.go_on_from(None)
            elif done % gap == gap // 2:
                older = [one for one in self.living()[1:] if self.forms[one] == self.form]
                step = self.go_on_from(older[-1]) if older else step
        self.ckpt.close()
        self.seen.steps = done
        return self.seen

    def living(self) -> list[int]:
        self.ckpt.wait()
        return [c.step for c in Catalog(Repository(self.store)).history() if c.step in self.kept]

    def fail(self, step: int) -> None:
        self.store.refused = self.draw.choice(["data/", "votes/"])
        try:
            self.ckpt.save_now(step).wait(SHORT_S)
        except CheckpointError:
            self.seen.failed_saves += 1
        self.store.refused = ""
        with contextlib.suppress(CheckpointError):
            self.ckpt.wait()

    def save(self, step: int, *, full: bool) -> None:
        expected = by_torch(self.run)
        commit = self.ckpt.save_now(step, full=full).wait(SHORT_S)
        self.kept[step], self.forms[step] = expected, self.form
        self.kept = {one: data for one, data in self.kept.items() if one >= step - 12}
        self.seen.raw_bytes += commit.raw_bytes
        self.seen.stored_bytes += commit.stored_bytes
        self.compare(commit)

    def compare(self, commit: Commit) -> None:
        found = read(self.store, commit)
        wrong = same(
            torch.load(io.BytesIO(self.kept[commit.save.step])), {k: v for k, v in found.items() if k != "rng"}
        )
        assert not wrong, f"step {commit.save.step}: {wrong[:20]}"
        self.seen.compared += 1

    def go_on_from(self, step: int | None) -> int:
        """Begin anew with the newest checkpoint, or go back to an older one."""
        if step is None:
            self.seen.restarts += 1
            self.ckpt.close()
            self.ckpt = self.opened()
            restored = self.ckpt.restore()
        else:
            self.seen.rewinds += 1
            restored = self.ckpt.restore(step=step)
            self.kept = {one: data for one, data in self.kept.items() if one <= step}
        mine = torch.load(io.BytesIO(by_torch(self.run)))
        wrong = same(torch.load(io.BytesIO(self.kept[restored])), mine)
        assert not wrong, f"restored step {restored}: {wrong[:20]}"
        return restored


def main(n_steps: int, out: str, seed: int = 1) -> None:
    story = Story(n_steps, seed)
    with fastckpt.events.subscribe(story.seen.look):
        seen = story.tell()
    result = {"command": f"python -m tests.differential.incremental_run {n_steps} {out}", "seed": seed, **vars(seen)}
    Path(out).parent.mkdir(exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
