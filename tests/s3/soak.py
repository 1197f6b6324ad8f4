"""A soak: jobs that save without an end, in front of a real server, while everything goes wrong at random.

    python -m tests.s3.soak --minutes 30 --seed 1 --out tests/s3/results/soak.json

One repository has trainers that are killed and that race; another one a trainer that lives all the time; a reader reads the first one. All
of them go through a fault proxy. `soak_jobs.py` is what they do, `soak_judge.py` what must never be seen. Exit status 1: it was.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastckpt
from fastckpt.errors import CheckpointError
from fastckpt.store.cloud import open_s3
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import Fault, FaultProxy, Rule
from tests import s3server
from tests.s3 import soak_jobs
from tests.s3.soak_judge import Event, leaks_of, problems_of
from tests.support.repositories import check_all

WEIGHTS = {
    Fault.SLOW_DOWN: 3,
    Fault.INTERNAL_ERROR: 3,
    Fault.RESET: 3,
    Fault.LOST_ACK: 6,
    Fault.TRUNCATE: 3,
    Fault.FLIP_REQUEST: 3,
    Fault.FLIP_RESPONSE: 3,
    Fault.STALL: 1,
    Fault.STALL_RESPONSE: 1,
    Fault.ERROR_IN_200: 2,
    Fault.ANSWER: 2,
}
ANSWERS = ((403, "AccessDenied"), (400, "ExpiredToken"), (403, "RequestTimeTooSkewed"), (429, "TooManyRequests"))
# Of answers, only objects: a listing over plain http is covered by no digest (docs/stores.md).
OBJECTS = (r"/data/\d", r"/votes/\d", r"/commits/\d", r"/epochs/\d")
MOST_STALL_S = 5.0


@dataclass
class Soak:
    """A run under way."""

    rng: random.Random
    seconds: float
    pause_s: float
    folder: Path
    proxy: FaultProxy
    buckets: tuple[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    stalled: list[tuple[float, Rule]] = field(default_factory=list)
    flip: Rule | None = None
    trainers: list[Any] = field(default_factory=list)
    writers: int = 0

    def __post_init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.s3.soak_jobs"])
        self.stops: dict[Any, Any] = {}

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(self, work: Any, name: str, *arguments: Any) -> Any:
        # The end of a pipe says "stop": an Event's lock would stay taken by a process that is killed.
        stop, mine = self.context.Pipe(duplex=False)
        given = (dict(os.environ), work.__name__, self.folder / f"{name}.jsonl", stop, *arguments)
        process = self.context.Process(target=run, args=given, name=name, daemon=True)
        process.start()
        stop.close()
        self.stops[process] = mine
        return process

    def ended(self, process: Any, patience_s: float = 0.0) -> None:
        """Have a process stop if it does not by itself, and forget it."""
        self.stops.pop(process).close()
        process.join(patience_s or None)
        if process.is_alive():
            self.problems.append(f"{process.name} did not end: it hangs")
            process.kill()
            process.join()

    def trainer(self, bucket: str, *, steady: str = "") -> Any:
        self.writers += 1
        number = self.writers
        seed = self.rng.randrange(1 << 30)
        return self.start(soak_jobs.train, f"writer-{number}", f"s3://{bucket}/run", number, seed, self.pause_s, steady)

    def tend(self) -> None:
        """Keep a trainer alive; at times two."""
        for process in list(self.trainers):
            if not process.is_alive():
                self.ended(process)
                self.trainers.remove(process)
        if not self.trainers or (len(self.trainers) < 2 and self.rng.random() < 0.012):
            self.counts["races" if self.trainers else "starts"] += 1
            self.trainers.append(self.trainer(self.buckets[0]))
        if self.rng.random() < 0.008:
            self.counts["kills"] += 1
            self.rng.choice(self.trainers).kill()

    # -- faults --------------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        """Add a rule."""
        rng = self.rng
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        method, match = rng.choice(("", "PUT", "GET", "HEAD", "DELETE")), rng.choice(("", "", "list-type", *OBJECTS))
        count, answer = rng.choice((1, 1, 1, 2, 4)), rng.choice(ANSWERS)
        if kind is Fault.FLIP_RESPONSE:
            if self.flip is not None and self.flip.count:  # what comes back wrong twice in a row counts as damage
                return
            method, match, count = "GET", rng.choice(OBJECTS), 1
        elif kind is Fault.FLIP_REQUEST:
            method, match = "PUT", rng.choice(OBJECTS)
        elif kind is Fault.TRUNCATE:
            method = "GET"
        elif kind is Fault.ANSWER:
            count = 1
        rule = self.proxy.add(
            kind, method=method, match=match, count=count, skip=rng.randrange(4), status=answer[0], code=answer[1]
        )
        if kind is Fault.FLIP_RESPONSE:
            self.flip = rule
        if kind in (Fault.STALL, Fault.STALL_RESPONSE):
            self.stalled.append((time.monotonic() + rng.uniform(0.5, MOST_STALL_S), rule))

    def outage(self) -> None:
        """The server refuses everything until the rules are forgotten."""
        self.counts["outages"] += 1
        self.proxy.add(Fault.SLOW_DOWN, count=1 << 30)

    def tick(self, now: float) -> None:
        for until, rule in list(self.stalled):
            if until <= now:
                rule.release.set()
                self.stalled.remove((until, rule))

    def forget(self) -> None:
        """Count the faults so far, and forget rules and log."""
        exchanges = self.proxy.requests()
        self.counts["requests"] += len(exchanges)
        for exchange in exchanges:
            if exchange.fault is not None:
                self.counts[exchange.fault.name] += 1
        self.proxy.clear()
        self.stalled.clear()
        self.flip = None

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        reader = self.start(
            soak_jobs.read,
            "reader",
            f"s3://{self.buckets[0]}/run",
            self.rng.randrange(1 << 30),
            self.pause_s,
        )
        steady = self.trainer(self.buckets[1], steady="steady trainer")
        self.trainers.append(self.trainer(self.buckets[0]))
        try:
            for name in ("writer-1", "writer-2"):  # who cannot begin ends, and that is no fault
                self.await_acknowledgement(name)
            end = time.monotonic() + self.seconds
            fault_at = forget_at = time.monotonic()
            while (now := time.monotonic()) < end:
                self.tick(now)
                self.tend()
                if now >= fault_at:
                    self.fault()
                    fault_at = now + self.rng.expovariate(2.0)
                if now >= forget_at:  # an outage lasts until then
                    self.forget()
                    outage = self.rng.random() < 0.15
                    if outage:
                        self.outage()
                    forget_at = now + (self.rng.uniform(1, 6) if outage else 15.0)
                for process in (reader, steady):
                    if not process.is_alive():
                        last = [exchange for exchange in self.proxy.requests() if exchange.fault][-20:]
                        self.problems.append(f"{process.name} ended with {process.exitcode}; the last faults: {last}")
                        return
                time.sleep(0.1)  # the world's own pace; nothing waits for anything here
        finally:
            self.forget()
            for process in (reader, steady, *self.trainers):
                self.ended(process, 150)

    def await_acknowledgement(self, name: str) -> None:
        deadline = time.monotonic() + 240
        file = self.folder / f"{name}.jsonl"
        while not (file.exists() and '"acked"' in file.read_text()):
            if time.monotonic() > deadline:
                journal = file.read_text()[-2000:] if file.exists() else "none"
                raise RuntimeError(f"{name} has acknowledged nothing after 240 s; its journal: {journal}")
            time.sleep(0.1)

    def events(self) -> list[Event]:
        return [json.loads(line) for file in self.folder.glob("*.jsonl") for line in file.read_text().splitlines()]

    def judge(self, server: s3server.S3Server) -> dict[str, Any]:
        """Problems of all journals and of what the server has at the end; and figures."""
        for bucket in self.buckets:
            with Retrying(open_s3(f"s3://{bucket}/run", endpoint_url=server.url)) as store:
                try:
                    check_all(store)
                except Exception as error:
                    self.problems.append(f"{bucket} at the end: {error!r}")
        # A reader that comes when all is quiet must find all that was acknowledged.
        notes = soak_jobs.Journal(self.folder / "last.jsonl")
        t0 = time.monotonic()
        try:
            found, exact = soak_jobs.found_in(fastckpt.load(f"s3://{self.buckets[0]}/run"))
            notes.note("read", t0=t0, found=found, exact=exact, newest=True)
        except soak_jobs.NOTHING:
            notes.note("none", t0=t0)
        except CheckpointError as error:
            self.problems.append(f"a reader at the end: {error!r}")
        events = self.events()
        racing = [event for event in events if not _of_steady(event, events)]
        steady = [event for event in events if _of_steady(event, events)]
        leaks, figures = leaks_of(events)
        self.problems += [*problems_of(racing), *problems_of(steady), *leaks]
        if any(event["what"] == "superseded" for event in steady):
            self.problems.append("the only trainer of its repository was told that another has taken over")
        by_name = Counter(event["what"] for event in events)
        errors = Counter(f"{event['what']}: {event['error']}" for event in events if "text" in event)
        return {
            "problems": self.problems,
            "saves begun": by_name["begun"],
            "saves acknowledged": by_name["acked"],
            "restores": by_name["restored"],
            "reads": by_name["read"],
            "told that another has taken over": by_name["superseded"],
            "errors": dict(sorted(errors.items())),
            "faults and kills": dict(sorted(self.counts.items())),
            "health": figures,
        }


def _of_steady(event: Event, events: list[Event]) -> bool:
    """The steady trainer is the first writer."""
    return event.get("writer") == 1 or event.get("who") == "steady trainer"


def run(environment: dict[str, str], work: str, *arguments: Any) -> None:
    """The entry of a process. Its variables are those of the fork server, which other tests may have started long before."""
    os.environ.clear()
    os.environ.update(environment)
    soak_jobs.guarded(getattr(soak_jobs, work))(*arguments)


@contextlib.contextmanager
def _environment(found: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.upper().startswith("AWS_") or name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update(found)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def soak(server: s3server.S3Server, seed: int, seconds: float, pause_s: float, folder: Path) -> dict[str, Any]:
    """Run it, with journals in `folder`; returns figures, among them "problems"."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with (
        FaultProxy(host, int(port)) as proxy,
        _environment({**server.environment(), "AWS_ENDPOINT_URL_S3": proxy.url}),
    ):
        buckets = server.new_bucket(), server.new_bucket()
        one = Soak(random.Random(seed), seconds, pause_s, folder, proxy, buckets)
        one.run()
        return {
            "date": datetime.date.today().isoformat(),
            "seed": seed,
            "seconds": seconds,
            "versions": {
                "fastckpt": fastckpt.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "server": server.version,
            },
            **one.judge(server),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults, kills and races in front of radosgw")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between saves, and between reads")
    parser.add_argument("--out", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    print("seed", arguments.seed, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="fastckpt-soak-"))
    print("journals:", folder, flush=True)
    server = s3server.start("radosgw")
    try:
        result = soak(server, arguments.seed, arguments.minutes * 60, arguments.pause, folder)
    finally:
        server.stop()
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
