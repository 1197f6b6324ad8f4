"""What real ranks have saved is read by one process, whole, and goes back into ranks from one file."""

from __future__ import annotations

from pathlib import Path

import torch

import fastckpt
from fastckpt import cli
from tests.distributed import programs
from tests.support.ranks import run_ranks


def test_from_many_ranks_to_one_file_and_back(tmp_path: Path) -> None:
    """Two jobs of two processes, which have to import torch's FSDP: some 7 s."""
    mode = "fsdp" if programs.TRAINS_FSDP2 else "tp"
    url, saved, out = f"{tmp_path}/run", f"{tmp_path}/run.pt", f"{tmp_path}/x.fckpt"
    run_ranks(2, programs.save_whole, url, mode)
    assert cli.main(["restore", url, "--out", out]) == cli.OK
    wholes = torch.load(saved)
    for found in (fastckpt.load(url), fastckpt.load(out)):
        for name, tensor in wholes.items():
            kind, _, rest = name.partition(".")
            key, _, role = rest.partition(".")
            one = found["model"][rest] if kind == "model" else found["optimizer"]["state"][int(key)][role]
            assert programs.same(one.detach(), tensor), name
    with fastckpt.open(url) as reader:
        assert all(programs.same(reader[name], tensor) for name, tensor in wholes.items() if name.startswith("model."))
        assert all(name.startswith("rng.") for name in reader.of_each_rank)
    assert run_ranks(2, programs.fill_wholes, [url, out], saved, mode) == [[], []]
