"""One of many ranged reads that stalls does not stall a restore: the range is read a second time, on another connection."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import fastckpt
from fastckpt.store.cloud import S3Store
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import Fault, FaultProxy

pytestmark = pytest.mark.s3

STALL_S = 60.0
"""The store's own time-out: so long a restore would take without a second read."""
OPTIONS = fastckpt.Options(connections=16, threads=2, compress=False)


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.STALL_RESPONSE])
def test_one_stalled_read_of_many(fault: Fault, open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    """36 MB, some 18 reads. What is stalled is held until the restore is over, and only then let go."""
    values = torch.randint(0, 256, (12, 3_000_000), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    state = {f"t{number}": value.clone() for number, value in enumerate(values)}
    direct = Retrying(open_store())
    with fastckpt.Checkpointer(direct, state, every=None, spot=None, options=OPTIONS) as ckpt:
        ckpt.save_now(1).wait()
    for value in state.values():
        value.zero_()
    store = Retrying(open_store(endpoint_url=proxy.url, stall_timeout_s=STALL_S))
    with fastckpt.Checkpointer(store, state, read_only=True, spot=None, options=OPTIONS) as ckpt:
        rule = proxy.add(fault, method="GET", match="/data/", skip=9)
        started = time.monotonic()
        assert ckpt.restore() == 1
        assert rule.reached.is_set()
        assert not rule.release.is_set()
        assert time.monotonic() - started < STALL_S
    assert all(torch.equal(state[f"t{number}"], value) for number, value in enumerate(values))
    reads = [(exchange.target, exchange.headers.get("range"), exchange.fault) for exchange in proxy.requests("GET")]
    (stalled,) = (read for read in reads if read[2] is fault)
    assert sorted(read[2] is None for read in reads if read[:2] == stalled[:2]) == [False, True]
