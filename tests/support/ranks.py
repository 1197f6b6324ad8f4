"""Ranks of one job, as processes forked from a server that has imported torch: real process groups over loopback, 0.3 s each."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.support.forked import _context

LIMIT_S = 120.0


@dataclass
class Rank:
    """One process of a job."""

    number: int
    process: BaseProcess
    _folder: Path

    @property
    def result(self) -> Any:
        """What its function has returned. AssertionError if it has not."""
        path = self._folder / f"result-{self.number}"
        assert path.exists(), f"rank {self.number} has no result: exit status {self.process.exitcode}\n{self.log}"
        return pickle.loads(path.read_bytes())

    @property
    def log(self) -> str:
        """What it has written to both outputs."""
        path = self._folder / f"log-{self.number}"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self, words: str) -> bool:
        """Whether it has written this."""
        return words in self.log

    def wait_for(self, words: str, limit_s: float = LIMIT_S) -> None:
        """Wait until it has written this."""
        end_s = time.monotonic() + limit_s
        while not self.said(words):
            assert time.monotonic() < end_s, f"rank {self.number} never said {words!r}:\n{self.log}"
            assert self.process.is_alive() or self.said(words), (
                f"rank {self.number} ended without {words!r}:\n{self.log}"
            )
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def started(
    n: int,
    function: Callable[..., Any],
    *arguments: Any,
    agent_store: bool = False,
    environment: dict[str, str] | None = None,
) -> Iterator[list[Rank]]:
    """Ranks 0 to n − 1, each calling `function(*arguments)` in a gloo process group. Those that live at the end are killed.

    agent_store: the store of the group lives in this process, as torchrun's agent has it; else in rank 0.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent_store else None
        port = store.port if store is not None else _free_port()
        ranks = []
        for number in range(n):
            variables = {
                "RANK": str(number),
                "WORLD_SIZE": str(n),
                "LOCAL_RANK": str(number),
                "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": str(agent_store),
                **(environment or {}),
            }
            process = _context().Process(target=_run, args=(name, number, variables, function, arguments))
            process.start()
            ranks.append(Rank(number, process, folder))
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


def run_ranks(
    n: int, function: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S, **settings: Any
) -> list[Any]:
    """What each rank's call has returned. AssertionError, with its output, if one fails."""
    with started(n, function, *arguments, **settings) as ranks:
        join(ranks, limit_s)
        return [rank.result for rank in ranks]


def join(ranks: list[Rank], limit_s: float = LIMIT_S) -> None:
    """Wait until they have ended."""
    end_s = time.monotonic() + limit_s
    for rank in ranks:
        rank.process.join(max(0.0, end_s - time.monotonic()))
        if rank.process.exitcode is None:
            logs = "\n".join(f"--- rank {one.number}\n{one.log}" for one in ranks)
            raise AssertionError(f"rank {rank.number} has not ended after {limit_s} s\n{logs}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(
    folder: str, number: int, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    log = os.open(f"{folder}/log-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo")
        result = function(*arguments)
        path = Path(folder) / f"result-{number}"
        path.with_suffix(".part").write_bytes(pickle.dumps(result))
        path.with_suffix(".part").rename(path)
    except BaseException:
        traceback.print_exc()
        raise
