"""The effort of the encoder against links of any speed, in a simulation that is fed with measured rates: no time passes."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import pytest

from fastckpt.codec import Effort
from fastckpt.options import Options
from fastckpt.writing.effort import Efforts
from fastckpt.writing.uplink import Uplink

MIB = 1 << 20
CHUNK = 16 * MIB  # four at once: fewer steps
STATE_BYTES = 8 << 30


class Kind(NamedTuple):
    """What one thread makes of chunks of one kind, by effort: bytes a second, and stored / raw bytes."""

    rates: tuple[float, float, float, float]
    ratios: tuple[float, float, float, float]


# Measured on one core with AVX-512: float32 weights, and moments of an embedding half of whose rows are zero. HIGH is the best nowhere.
FLOAT32 = Kind((13.2e9, 5.4e9, 5.5e9, 5.5e9), (1.0, 0.831, 0.831, 0.831))
ROWS = Kind((12.8e9, 1.84e9, 0.68e9, 0.08e9), (1.0, 0.534, 0.419, 0.420))
SLOW_CORE = Kind((2.6e9, 0.55e9, 0.5e9, 0.5e9), (1.0, 0.831, 0.831, 0.831))

KINDS = {"float32": FLOAT32, "zero rows": ROWS, "a slow core": SLOW_CORE}
GBITS = (0.05, 1, 4, 10, 25, 100)


class Machine:
    """Encoders, packs and connections, moved from one end of something to the next."""

    def __init__(
        self, kind: Kind, link: list[tuple[float, float]], threads: int, fixed: str, source: float = 1e12
    ) -> None:
        """link: (from when on, bytes a second). source: bytes a second that the snapshot gives each thread."""
        options = Options(threads=threads, connections=8, host_budget_bytes=8 << 30, effort=fixed, deltas=False)
        self.kind, self.link, self.source, self.threads = kind, link, source, threads
        self.uplink = Uplink(options)
        self.now_s = 0.0

    def rate(self, now_s: float) -> float:
        return [rate for since_s, rate in self.link if since_s <= now_s][-1]

    def save(self, raw_bytes: int) -> float:
        """Save so much; returns the seconds until all is sent."""
        uplink, begun_s = self.uplink, self.now_s
        uplink.begin(raw_bytes)
        left, sending, sealed = raw_bytes, dict[int, tuple[float, float, int]](), list[int]()
        open_packs: dict[int, list[int]] = {}  # thread → [capacity, filled]
        events: list[tuple[float, int]] = [(self.now_s, thread) for thread in range(self.threads)]
        number, sent_at = 0, self.now_s
        while events or sending or sealed:
            while sealed and len(sending) < uplink.link.connections:
                number += 1
                size = sealed.pop(0)
                sending[number] = (float(size), self.now_s, size)
            share = self.rate(self.now_s) / max(1, len(sending))
            ends = min((rest / share for rest, _, _ in sending.values()), default=float("inf"))
            until = min(events[0][0] if events else float("inf"), self.now_s + ends)
            until = min([until, *(since for since, _ in self.link if since > self.now_s)])
            moved = share * (until - self.now_s)
            sending = {n: (rest - moved, since, size) for n, (rest, since, size) in sending.items()}
            self.now_s = until
            for n, (rest, since, size) in list(sending.items()):
                if rest <= 1e-3:
                    del sending[n]
                    sent_at = self.now_s
                    busy = len(sending) + 1
                    uplink.put_finished(
                        self.now_s, size, self.now_s - since, waiting=len(sealed), sending=busy, more=left > 0
                    )
            blocked = []
            while events and events[0][0] <= self.now_s:
                _, thread = heapq.heappop(events)
                if thread not in open_packs:
                    if left <= 0:
                        continue
                    if len(open_packs) + len(sealed) + len(sending) >= uplink.packs_at_once:
                        blocked.append(thread)
                        continue
                    open_packs[thread] = [max(CHUNK, uplink.pack_bytes(left, uplink.buffers._n_bytes)), 0]
                capacity, filled = open_packs[thread]
                if left <= 0 or capacity - filled < CHUNK:
                    sealed.append(filled)
                    del open_packs[thread]
                    heapq.heappush(events, (self.now_s, thread))
                    continue
                left -= CHUNK
                effort = uplink.efforts.level
                seconds, waited_s = CHUNK / self.kind.rates[effort], CHUNK / self.source
                stored = int(CHUNK * self.kind.ratios[effort])
                uplink.efforts.encoded(effort, CHUNK, stored, seconds, waited_s)
                open_packs[thread][1] += stored
                heapq.heappush(events, (self.now_s + seconds + waited_s, thread))
            for thread in blocked:  # they go on when a put has ended
                after = min((rest / share for rest, _, _ in sending.values()), default=0.0)
                heapq.heappush(events, (self.now_s + max(after, 1e-6), thread))
        return sent_at - begun_s


def best_fixed(kind: Kind, gbit: float, threads: int, raw_bytes: int = STATE_BYTES) -> float:
    """Seconds of a save with the best of the fixed efforts."""
    link = [(0.0, gbit * 1e9 / 8)]
    return min(Machine(kind, link, threads, effort).save(raw_bytes) for effort in ("none", "fast", "normal"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("gbit", GBITS)
def test_it_is_as_good_as_the_best_fixed_effort(gbit: float, threads: int, name: str) -> None:
    best = best_fixed(KINDS[name], gbit, threads)
    machine = Machine(KINDS[name], [(0.0, gbit * 1e9 / 8)], threads, "auto")
    first, second = machine.save(STATE_BYTES), machine.save(STATE_BYTES)
    assert best / second >= 0.95, f"{best:.2f} s at best, {second:.2f} s"
    assert best / first >= 0.7, "the first save has to find out"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("before", "after"), [(100, 0.5), (0.5, 100), (10, 1), (1, 25)])
def test_a_link_that_changes_midway(before: float, after: float, name: str) -> None:
    kind, raw_bytes = KINDS[name], 16 << 30
    half = best_fixed(kind, before, 2, raw_bytes // 2)
    rest = best_fixed(kind, after, 2, raw_bytes // 2)
    machine = Machine(kind, [(0.0, before * 1e9 / 8), (half, after * 1e9 / 8)], 2, "auto")
    took = machine.save(raw_bytes)
    # When the link changes, all packs are of the old effort, and it takes as many to see what the new one carries.
    under_way = 2 * machine.uplink.packs_at_once * 32 * MIB
    assert took - under_way / (after * 1e9 / 8) <= (half + rest) / 0.95


def test_an_encoder_that_waits_for_the_state_keeps_its_effort() -> None:
    machine = Machine(FLOAT32, [(0.0, 12e9)], 2, "auto", source=1e9)
    machine.save(STATE_BYTES)
    assert machine.uplink.efforts.level is Effort.NORMAL


def test_saves_that_refer_to_others_are_never_stored_raw() -> None:
    machine = Machine(SLOW_CORE, [(0.0, 12e9)], 2, "auto")
    machine.save(STATE_BYTES)
    assert machine.uplink.efforts.level is Effort.NONE
    machine.uplink = Uplink(Options(threads=2, connections=8, host_budget_bytes=8 << 30))
    machine.save(STATE_BYTES)
    assert machine.uplink.efforts.level is Effort.FAST


def test_a_fixed_effort_stays() -> None:
    efforts = Efforts(2, Effort.FAST)
    for waiting in (0, 3):
        for _ in range(10):
            efforts.encoded(Effort.FAST, CHUNK, CHUNK, 1.0, 0.0)
            assert not efforts.put_finished(1.0, CHUNK, waiting, 8)
    assert efforts.level is Effort.FAST
