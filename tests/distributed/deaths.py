"""Programs of ranks that are killed, or that kill themselves at a chosen moment."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch.distributed as dist

from fastckpt import Every
from tests.distributed.programs import Training, checkpointer, hurry, leave_at_once


def train_until_killed(url: str, mode: str, pause_s: float = 0.05) -> None:
    """Saves each step, and says which are durable."""
    hurry()
    leave_at_once()
    training = Training(mode)
    with checkpointer(url, training, every=Every(steps=1), close_timeout_s=25.0) as ckpt:
        start = ckpt.restore()
        said = start
        for step in range(start, 100_000):
            training.step(step)
            if ckpt.step(step + 1):
                return
            durable = ckpt.stats.durable_step or 0
            if durable > said:
                said = durable
                print(f"durable {durable}", flush=True)
            time.sleep(pause_s)


def die_before_commit(url: str, moment: str) -> int:
    """One save; rank 0 dies when it has seen all votes: before the fate is decided, before the commit record is put, or after it."""
    hurry(6.0)  # whoever commits next waits 2 s for its turn, and votes are looked for for so long
    from fastckpt.ranks.fate import Fate
    from fastckpt.repository import joint_commit

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 0:
        if moment == "before the fate":
            Fate.commit = die  # type: ignore[method-assign]
        elif moment == "before the put":
            joint_commit.commit_votes = die  # type: ignore[assignment]
        else:
            Fate.finish = die  # type: ignore[method-assign]
    training = Training("plain")
    with checkpointer(url, training, every=None) as ckpt:
        ckpt.restore()
        return ckpt.save_now(1).wait().save.step


def die_uncounted(url: str) -> int:
    """One save; rank 2 dies when it has told its vote, before that is counted."""
    hurry()
    leave_at_once()
    if dist.get_rank() == 2:
        from fastckpt.ranks.board import StoreBoard, member_key

        def join(board: StoreBoard, group: str, member: int, value: bytes) -> None:
            board.put(member_key(group, member), value)
            if group.endswith("/votes"):
                os.kill(os.getpid(), signal.SIGKILL)
            board._ask(lambda store: store.add(f"{board._prefix}{group}/joined", 1))

        StoreBoard.join = join  # type: ignore[method-assign]
    training = Training("plain")
    with checkpointer(url, training, every=None) as ckpt:
        ckpt.restore()
        return ckpt.save_now(1).wait().save.step
