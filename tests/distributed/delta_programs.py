"""What ranks run in test_deltas.py: a run that goes on on other ranks, and goes back, with differences all the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastckpt import Every
from fastckpt.store.local import LocalStore
from tests.distributed.programs import Training, by_modulus, checkpointer, same
from tests.support.bases import settle, share_of

SIZES = {"width": 516, "hidden": 2100, "layers": 1}
"""Parts of three and of four ranks are larger than a megabyte, so each has chunks of its own; and even, as FSDP pads uneven ones."""


def _save(ckpt: Any, url: str, training: Training, step: int) -> dict[str, float]:
    """Save a step, and all tensors as wholes beside it. What all ranks have stored, of what they had."""
    commit = ckpt.save_now(step).wait()
    wholes = training.wholes()
    if dist.get_rank() == 0:
        torch.save(wholes, f"{url}.{step}.pt")
    return {"raw": commit.raw_bytes, "stored": commit.stored_bytes}


def begin(url: str) -> list[dict[str, float]]:
    """Save steps 1 to 3."""
    training, found = Training("fsdp", **SIZES), []
    with checkpointer(url, training, every=None, keep=None) as ckpt:
        ckpt.restore()
        for step in range(1, 4):
            training.step(step)
            found.append(_save(ckpt, url, training, step))
    return found


def go_on(url: str) -> dict[str, Any]:
    """Go on on another number of ranks: steps 4 and 5; then back to 4, and 6."""
    training = Training("fsdp", seed=7, **SIZES)
    found: dict[str, Any] = {}
    with checkpointer(url, training, every=Every(steps=100), keep=None, reassign=by_modulus) as ckpt:
        assert ckpt.restore() == 3
        base = ckpt._engine.queue.bases.newest
        assert base is not None
        found["placed"] = share_of(base, LocalStore(url), "stored")
        found["lent"] = share_of(base, LocalStore(url), "lent")
        for step in (4, 5):
            training.step(step)
            found[f"step {step}"] = _save(ckpt, url, training, step)
        assert ckpt.restore(step=4) == 4
        settle()
        base = ckpt._engine.queue.bases.newest
        assert base is not None
        found["back"] = share_of(base, LocalStore(url), "lent")
        training.step(6)
        found["step 6"] = _save(ckpt, url, training, 6)
    return found


def look(url: str, steps: list[int]) -> list[str]:
    """Restore each step, and compare it with what it was. Returns what is otherwise."""
    wrong = []
    for step in steps:
        training = Training("fsdp", seed=11, **SIZES)
        with checkpointer(url, training, every=None, read_only=True, reassign=by_modulus) as ckpt:
            ckpt.restore(step=step)
        saved, found = torch.load(f"{url}.{step}.pt"), training.wholes()
        wrong += [f"step {step}: {name}" for name, one in saved.items() if not same(one, found[name])]
    return wrong
