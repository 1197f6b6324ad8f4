"""A small job in front of the S3 server and behind a fault proxy: it restores and saves, and is judged by what the server then has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastckpt
from fastckpt.errors import CheckpointError, NoCheckpointError
from fastckpt.store.base import Store
from fastckpt.store.cloud import S3Store
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import FaultProxy
from tests.support.repositories import check_all

OPTIONS = fastckpt.Options(threads=1, connections=1, host_budget_bytes=64 << 20)
STALL_S = 0.2
LANES = 40_000


@dataclass
class Scene:
    """`open_store` is the fixture; `proxy` stands in front of the server."""

    open_store: Callable[..., S3Store]
    proxy: FaultProxy
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the job's store; by default it goes through the proxy."""
    judged_by: dict[str, Any] = field(default_factory=dict)
    """Settings of the store that judges."""
    acknowledged: int = 0
    """The newest step whose `durable` has resolved."""
    begun: set[int] = field(default_factory=set)

    def store(self) -> Store:
        """The job's: with all tries, but without pauses between them."""
        found = self.open_store(**{"endpoint_url": self.proxy.url, "stall_timeout_s": STALL_S, **self.settings})
        return Retrying(found, give_up_s=20.0, sleep=lambda pause_s: None)

    def direct(self) -> Store:
        """Past the proxy."""
        return self.open_store(**self.judged_by)

    def run(self, store: Store | None = None) -> CheckpointError | None:
        """An incarnation: restore, one step, save it, retire the one before the last. The typed error that ended it, if one did."""
        state = {"s": {"values": torch.zeros(LANES), "step": 0}}
        try:
            with fastckpt.Checkpointer(
                self.store() if store is None else store,
                state,
                every=None,
                keep=fastckpt.Keep(last=1),
                spot=None,
                options=OPTIONS,
            ) as ckpt:
                step = ckpt.restore()
                self._judge_restored(step, state["s"])
                step += 1
                state["s"]["values"], state["s"]["step"] = values(step), step
                self.begun.add(step)
                ckpt.save_now(step).wait()
                self.acknowledged = step
                ckpt.wait()
        except CheckpointError as error:
            return error
        return None

    def read(self, store: Store | None = None) -> CheckpointError | None:
        """A reader. The typed error, if there was one; then the objects must be as they were."""
        state = {"s": {"values": torch.full((LANES,), -1.0), "step": -1}}
        try:
            with fastckpt.Checkpointer(
                self.store() if store is None else store, state, read_only=True, spot=None, options=OPTIONS
            ) as ckpt:
                self._judge_restored(ckpt.restore(), state["s"])
        except CheckpointError as error:
            assert state["s"]["step"] == -1
            assert torch.equal(state["s"]["values"], torch.full((LANES,), -1.0))
            return error
        return None

    def _judge_restored(self, step: int, found: dict[str, Any]) -> None:
        assert step >= self.acknowledged, f"step {self.acknowledged} was acknowledged, a restore finds {step}"
        if step:
            assert step in self.begun, f"nobody saved step {step}"
            assert found["step"] == step
            assert torch.equal(found["values"], values(step)), f"step {step} has other bits"

    def judge(self) -> None:
        """What is there, read without faults: all that was acknowledged, whole; and the job can go on from it."""
        self.proxy.clear()
        direct = self.direct()
        check_all(direct)
        error = self.read(direct)
        assert error is None or (isinstance(error, NoCheckpointError) and not self.acknowledged), error
        assert self.run(direct) is None
        check_all(direct)


def values(step: int) -> torch.Tensor:
    return torch.randn(LANES, generator=torch.Generator().manual_seed(step))
