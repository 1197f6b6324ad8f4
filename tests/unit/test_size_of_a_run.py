"""How large the repository of a run is: hundreds of saves of a Checkpointer, the store's clock moved past the grace by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastckpt import Checkpointer, Keep, events
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S, plan_retention
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import OPTIONS, check_all

MOST = 4.5
"""Of a repository with Keep(last=3), in full checkpoints, when all that was retired is past its grace."""
MOST_BESIDE = 5.0
"""… while what the last save has retired is within it."""
Change = Callable[[int], object]


def noise(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)


def frozen_backbone(generator: torch.Generator) -> tuple[dict[str, Any], Change]:
    state = {"backbone": noise(100_000, generator), "head": noise(10_000, generator).double()}
    return state, lambda step: state["head"].add_(noise(10_000, generator) * 1e-3)


def some_tensors_at_each_step(generator: torch.Generator) -> tuple[dict[str, Any], Change]:
    """What lies in old packs becomes useless one by one, while the rest of these packs is needed."""
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.int16)
    state = {str(kind): noise(8_000, generator).mul(1000).to(kind) for kind in types}

    def change(step: int) -> None:
        kind = types[int(torch.randint(len(types), (1,), generator=generator))]
        state[str(kind)].copy_(noise(8_000, generator).mul(1000))

    return state, change


def training(generator: torch.Generator) -> tuple[dict[str, Any], Change]:
    """Like AdamW with working copies: the first moment is new each time, the second one hardly changes."""
    n = 135_000  # each a chunk of its own
    master, first, second = noise(n, generator), noise(n, generator), noise(n, generator).abs() * 1e-6
    state = {"master": master, "exp_avg": first, "exp_avg_sq": second, "model": master.bfloat16()}

    def change(step: int) -> None:
        gradient = noise(n, generator) * 1e-3
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        master.add_(first / (second.sqrt() + 1e-8), alpha=-1e-5)
        state["model"].copy_(master)

    return state, change


def run_of(
    kind: Callable[[torch.Generator], tuple[dict[str, Any], Change]], saves: int, seconds: float, keep: Keep
) -> Any:
    """Returns the bytes of the first checkpoint, those of the repository after each save, and the last report of retention."""
    now_s, told = [1e9], list[events.RetentionEnded]()
    store = MemoryStore(clock=lambda: now_s[0])
    state, change = kind(torch.Generator().manual_seed(1))
    after: list[int] = []
    with (
        events.subscribe(lambda e: told.append(e) if isinstance(e, events.RetentionEnded) else None),
        Checkpointer(store, state, every=None, spot=None, keep=keep, options=OPTIONS) as ckpt,
    ):
        ckpt.restore()
        for step in range(1, saves + 1):
            change(step)
            ckpt.save_now(step).wait()
            ckpt.wait()
            now_s[0] += seconds
            after.append(sum(info.n_bytes for info in store.list("")))
    now_s[0] += GRACE_S
    store.put("data/clock", b"")  # the store's clock is read off what it lists
    collector = Collector(Repository(store))
    collector.run(plan_retention(collector.look(), keep, (), GRACE_S), None)
    check_all(store)
    after.append(sum(info.n_bytes for info in store.list("")))
    return after[0], after, told[-2]


@pytest.mark.parametrize(
    ("kind", "saves"),
    [
        (frozen_backbone, 200),
        (some_tensors_at_each_step, 200),
        (training, 20),
        pytest.param(training, 200, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_hundreds_of_saves_take_no_more_than_a_few_full_checkpoints(kind: Any, saves: int) -> None:
    """Some 3 s: saves and passes of the real thing, one after the other; 200 that train take 10."""
    full, after, last = run_of(kind, saves, GRACE_S + 1, Keep(last=3))
    assert after[-1] <= MOST * full, (after[-1] / full, last)
    assert max(after[5:]) <= MOST_BESIDE * full, (max(after) / full, last)
    assert 0 < last.base_bytes < last.stored_bytes, "all of these refer to saves that are no checkpoint any more"


def test_what_waits_for_its_grace_is_reported_and_capped() -> None:
    """All saves lie within one grace."""
    full, after, last = run_of(frozen_backbone, 40, 1.0, Keep(last=3))
    assert last.grace_bytes > full, "of the heads of as many as there were saves"
    full, capped, last = run_of(frozen_backbone, 40, 1.0, Keep(last=3, max_grace_bytes=full // 10))
    assert last.grace_bytes <= full // 10
    assert max(capped[5:]) < after[-2]
