"""Real torchrun: agents, and the workers that they start, as processes whose output can be read while they run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES, WORKER = ROOT / "examples", ROOT / "tests" / "distributed" / "worker.py"
LIMIT_S = 120.0


class Agent:
    """One torchrun, in a process group of its own with all its workers."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def log(self) -> str:
        """What it and its workers have written."""
        return self._log.read_text(errors="replace")

    def found(self, pattern: str) -> list[str]:
        """What the group of the pattern was, wherever it has been written."""
        return re.findall(pattern, self.log)

    def wait_for(self, pattern: str, times: int = 1) -> list[str]:
        """Wait until it was written so often."""
        end_s = time.monotonic() + LIMIT_S
        while len(found := self.found(pattern)) < times:
            assert time.monotonic() < end_s, f"never wrote {pattern!r}:\n{self.log}"
            assert self.process.poll() is None or len(self.found(pattern)) >= times, (
                f"ended with {self.process.returncode} without {pattern!r}:\n{self.log}"
            )
            time.sleep(0.02)
        return found

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Wait for its end: the exit status."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended after {limit_s} s:\n{self.log}") from None

    def worker(self, rank: int) -> int:
        """The process of a rank that was started last."""
        return int(self.wait_for(rf"\[rank {rank}\] pid (\d+)")[-1])

    @property
    def digests(self) -> list[str]:
        """What examples with --digest have printed last, rank 0's first. torchrun's workers write unbuffered: the end of a line may come
        after what the other rank writes.
        """
        found = dict(re.findall(r"rank (\d+): ([0-9a-f]{64})", self.log))
        return [found[rank] for rank in sorted(found, key=int)]

    def kill(self) -> None:
        """SIGKILL to it and all its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # A worker has a session of its own where torchrun gives it one.
        for pid in map(int, self.found(r"\[rank \d+\] pid (\d+)")):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if str(WORKER).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def torchrun(
    log: Path,
    script: Path,
    *arguments: object,
    n: int = 2,
    flags: Sequence[str] = ("--standalone",),
    inside: Sequence[str] = (),
    **environment: str,
) -> Iterator[Agent]:
    """An agent that starts n workers, each of which runs a script. Whatever lives at the end is killed.

    inside: a command that runs the one after it, elsewhere.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "--nproc-per-node", str(n), str(WORKER)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*inside, *command, str(script), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "AWS_EC2_METADATA_DISABLED": "true",
                "OMP_NUM_THREADS": "1",
                "FASTCKPT_THREADS": "1",
                **environment,
            },
        )
    agent = Agent(process, log)
    try:
        yield agent
    finally:
        agent.kill()


def run(log: Path, script: Path, *arguments: object, n: int = 2, **environment: str) -> Agent:
    """To its end, which has to be good."""
    with torchrun(log, script, *arguments, n=n, **environment) as agent:
        status = agent.wait()
    assert status == 0, agent.log
    return agent
