"""Packs and connections follow a link that is simulated: no time passes, and nothing is sent."""

from __future__ import annotations

import heapq

import pytest

from fastckpt.options import Options
from fastckpt.writing.link import Link
from fastckpt.writing.uplink import Uplink

MIB = 1 << 20


def send(link: Link, n_bytes: int, *, total: float, each: float, delay_s: float = 0.02, now_s: float = 0.0) -> float:
    """Send so many bytes over a link that carries `total` bytes a second, and `each` at most on one connection. Returns the time."""
    under_way: list[tuple[float, float, int]] = []  # end, begin, bytes
    while n_bytes > 0 or under_way:
        while n_bytes > 0 and len(under_way) < link.connections:
            size = min(n_bytes, link.pack_bytes(n_bytes, 32 * MIB))
            n_bytes -= size
            rate = min(each, total / link.connections)
            heapq.heappush(under_way, (now_s + delay_s + size / rate, now_s, size))
        now_s, begun_s, size = heapq.heappop(under_way)
        link.put_finished(now_s, size, now_s - begun_s, busy=n_bytes > 0)
    return now_s


@pytest.mark.parametrize(
    ("total", "each", "least", "most"),
    [
        (2000 * MIB, 80 * MIB, 22, 48),  # 25 connections fill it
        (6000 * MIB, 80 * MIB, 60, 64),  # 75 would: no more than the limit
        (100 * MIB, 90 * MIB, 2, 12),  # two fill it
        (25 * MIB, 1000 * MIB, 2, 12),  # one would
    ],
)
def test_connections_grow_as_long_as_they_carry_more(total: float, each: float, least: int, most: int) -> None:
    link = Link(8, 64)
    now_s = 0.0
    for _ in range(6):
        now_s = send(link, int(total * 60), total=total, each=each, now_s=now_s)
    assert least <= link.connections <= most
    assert link.bytes_per_s == pytest.approx(min(total, each * link.connections), rel=0.35)


def test_a_link_that_has_become_wider_is_found_out() -> None:
    link = Link(8, 64)
    now_s = send(link, 20_000 * MIB, total=100 * MIB, each=90 * MIB)
    narrow = link.connections
    for _ in range(4):
        now_s = send(link, 100_000 * MIB, total=4000 * MIB, each=80 * MIB, now_s=now_s)
    assert link.connections > max(narrow, 30)


def test_a_number_that_was_asked_for_stays() -> None:
    link = Link(4, 4)
    send(link, 10_000 * MIB, total=2000 * MIB, each=80 * MIB)
    assert link.connections == 4
    assert link.connection_bytes_per_s is not None
    assert 40 * MIB < link.connection_bytes_per_s <= 80 * MIB, "the last packs are short, and each waits for its answer"


def test_a_short_save_changes_nothing() -> None:
    link = Link(8, 64)
    send(link, 20 * MIB, total=2000 * MIB, each=80 * MIB)
    assert link.connections == 8


def test_lengths_of_packs() -> None:
    link = Link(8, 8)
    assert link.pack_bytes(1000 * MIB, 64 * MIB) == 32 * MIB, "never longer"
    assert link.pack_bytes(20 * MIB, 64 * MIB) == 4 * MIB, "never shorter than a chunk"
    assert link.pack_bytes(160 * MIB, 64 * MIB) == 10 * MIB, "two for each connection"
    assert link.pack_bytes(1000 * MIB, 12 * MIB) == 12 * MIB, "what the memory allows"
    link.put_finished(1.0, 8 * MIB, 1.0, busy=False)
    assert link.pack_bytes(1000 * MIB, 64 * MIB) == 16 * MIB, "two seconds of one connection"
    link.put_finished(90.0, 1 * MIB, 90.0, busy=False)
    for _ in range(20):
        link.put_finished(1000.0, 1 * MIB, 90.0, busy=False)
    assert link.pack_bytes(1000 * MIB, 64 * MIB) == 4 * MIB


@pytest.mark.parametrize("budget_mib", [16, 64, 96, 512, 4096, 65536])
@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("connections", [1, 8])
@pytest.mark.parametrize("most", [0, 64])
def test_packs_stay_within_their_memory(budget_mib: int, threads: int, connections: int, most: int) -> None:
    options = Options(
        threads=threads, connections=connections, max_connections=most, host_budget_bytes=budget_mib * MIB
    )
    uplink = Uplink(options)
    for connections_now in (connections, options.max_connections):
        uplink.link.connections = connections_now
        uplink.begin(10_000 * MIB)
        buffers = uplink.buffers
        assert buffers._n_bytes * buffers._most <= options.pack_buffer_bytes
        assert buffers._most >= connections + options.encoders
    assert options.pack_buffer_bytes + options.encoders * 4 * MIB <= options.pack_bytes + options.encoder_bytes
    if budget_mib >= 512:
        assert options.pack_bytes + options.encoder_bytes + options.snapshot_bytes <= options.host_budget_bytes
