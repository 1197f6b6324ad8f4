"""Snapshots of device tensors of which other ranks write a part: what this rank writes is whole, and nothing else is copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastckpt.snapshot import Stager
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.state.chunks import cuts_of
from tests.support.repositories import shared

MIB = 1 << 20


@pytest.mark.parametrize("verify", ["off", "always"])
def test_only_a_share_is_copied(gpu: torch.device, verify: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {
        "mine": torch.randn(300, generator=generator),
        "one": torch.randn(40, generator=generator),
        "ours": torch.randn(3 * MIB, generator=generator),
        "theirs": torch.randn(MIB, generator=generator),
        "two": torch.randn(50, generator=generator),
    }
    parameters = {name: torch.nn.Parameter(value.to(gpu)) for name, value in values.items()}
    shares = {"one": [(1, 160)], "two": [(1, 200)], "ours": [(0, 4 * MIB), (1, 8 * MIB)], "theirs": [(0, 4 * MIB)]}
    captured = shared(parameters, 1, shares)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    cuts = cuts_of(captured)
    one = Stager(64 * MIB, 1, "test", 20.0, verify)
    snapshot = one.begin(captured, cuts, FencedTensors([optimizer]), 1, ring=False)
    assert snapshot is not None
    snapshot.fence()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    found = {
        piece: snapshot.raw(number, np.empty(4 * MIB, np.uint8)).copy()
        for number, chunk in enumerate(cuts.chunks)
        for piece in [chunk.pieces]
    }
    snapshot.confirm()
    snapshot.close()
    names = {entry.storage: str(entry.name[0]) for entry in captured.tensors}
    copied = dict.fromkeys(values, b"")
    for pieces, content in found.items():
        at = 0
        for storage, _, n_bytes in pieces:
            copied[names[storage]] += content[at : at + n_bytes].tobytes()
            at += n_bytes
    whole = {name: value.numpy().tobytes() for name, value in values.items()}
    assert copied == {**whole, "ours": whole["ours"][4 * MIB :], "theirs": b""}
