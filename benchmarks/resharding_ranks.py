"""What the ranks of benchmarks/resharding_loads.py run: one job that saves with all contenders, and one for each layout that loads.

Each contender fills the tensors of a model and its optimizer that live already, and which hold zeros before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import fastckpt
from benchmarks import measure, resharding_peer
from benchmarks.resharding_needed import Chunk, needed
from benchmarks.workloads.gpt import CONTEXT, GPT, SEED, SIZES, tokens
from fastckpt.format.keys import COMMITS
from fastckpt.format.repository_records import Commit
from fastckpt.format.tensor_names import Name
from fastckpt.format.wholes import Box
from fastckpt.repository.commit import read_commit
from fastckpt.repository.inventory import take_inventory
from fastckpt.state.sharding import boxes_of
from fastckpt.store.local import LocalStore

FASTCKPT, DCP, FLOOR = "fastckpt", "dcp", "floor"
_DIVIDED = {"qkv": ColwiseParallel, "out": RowwiseParallel, "mlp.0": ColwiseParallel, "mlp.2": RowwiseParallel}

Live = dict[str, dict[str, Any]]


class Training:
    """A GPT under some parallelism, and AdamW. kind: FSDP2, TP or plain."""

    def __init__(self, kind: str, size: str) -> None:
        torch.manual_seed(SEED)
        self.model = GPT(SIZES[size])
        if kind == "FSDP2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif kind == "TP":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in self.model.blocks:
                parallelize_module(block, mesh, {name: style() for name, style in _DIVIDED.items()})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1)

    def train(self, steps: int) -> None:
        text = tokens()
        torch.manual_seed(SEED + dist.get_rank())
        for _ in range(steps):
            at = int(torch.randint(len(text) - CONTEXT - 1, ()))
            row = text[at : at + CONTEXT + 1][None]
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten()).backward()
            self.optimizer.step()

    def begin(self) -> None:
        """Give the optimizer its state, as a step does that changes nothing."""
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def live(self) -> Live:
        """The tensors that are saved and filled, each once, by the names of parameters."""
        found: Live = {"model": {}, "optimizer": {}}
        for name, parameter in self.model.named_parameters():
            found["model"][name] = parameter.detach()
            found["optimizer"][name] = self.optimizer.state[parameter]
        return found

    def parts(self) -> list[torch.Tensor]:
        """This process's own part of each."""
        return [local(tensor) for tensor in measure.tensors(self.live())]

    def boxes(self) -> dict[Name, list[Box]]:
        """The blocks of wholes that this process needs, by the names that a Checkpointer saves them under."""
        live, found = self.live(), {}
        for number, name in enumerate(live["model"]):
            found[("model", name)] = _boxes(live["model"][name])
            for key, tensor in live["optimizer"][name].items():
                found[("optimizer", "state", number, key)] = _boxes(tensor)
        return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _boxes(tensor: torch.Tensor) -> list[Box]:
    if isinstance(tensor, DTensor):
        return [(box.offset, box.shape) for box in boxes_of(tensor)]
    return [((0,) * tensor.dim(), tuple(tensor.shape))]


def checkpointer(folder: str, training: Training, **settings: Any) -> fastckpt.Checkpointer:
    state = {"model": training.model, "optimizer": training.optimizer}
    return fastckpt.Checkpointer(f"{folder}/{FASTCKPT}", state, every=None, spot=None, keep=None, **settings)


def save(settings: dict[str, Any]) -> dict[str, Any]:
    """Train some steps, and save with every contender. Returns the raw bytes of this rank's part, and why torch_checkpointing is absent."""
    training, folder = Training("FSDP2", settings["size"]), settings["folder"]
    training.train(settings["steps"])
    with checkpointer(folder, training) as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait()
    dcp.save(dict(training.live()), storage_writer=dcp.FileSystemWriter(f"{folder}/{DCP}"))
    why = resharding_peer.absence() or _fault(
        lambda: resharding_peer.save(f"{folder}/{resharding_peer.NAME}", training.live())
    )
    return {"raw_bytes": sum(part.nbytes for part in training.parts()), "absent": why}


def load(settings: dict[str, Any]) -> dict[str, Any]:
    """Round after round, all contenders in turn. The first round warms up: in it fastckpt goes first, and what it has put in place is what
    the others are compared with, and what the floor copies. RuntimeError if one puts other values in place.
    """
    training = Training(settings["kind"], settings["size"])
    training.begin()
    store = LocalStore(f"{settings['folder']}/{FASTCKPT}")
    (checkpoint,) = take_inventory(store, COMMITS).commits
    commit = read_commit(store, checkpoint)
    assert isinstance(commit, Commit)
    chunks = needed(store, commit, training.boxes())
    right: list[torch.Tensor] = []
    contenders = _contenders(training, settings["folder"], chunks, right)
    absent = settings["absent"] or _fault(lambda: contenders[resharding_peer.NAME]().close())
    if absent:
        del contenders[resharding_peer.NAME]
    samples: list[dict[str, Any]] = []
    for number in range(-1, settings["rounds"]):
        names = list(contenders)
        turn = max(0, number) % len(names)
        for name in names[turn:] + names[:turn]:
            sample = _measured(training, contenders[name])
            if not right:
                right += [part.clone() for part in training.parts()]
            if not all(map(_equal, training.parts(), right)):
                raise RuntimeError(f"{name} has put other values in place than {FASTCKPT}")
            if number >= 0:
                samples.append({"contender": name, "round": number, **sample})
    return {
        "samples": samples,
        "raw_bytes": sum(part.nbytes for part in right),
        "stored_bytes": sum(chunk.n_bytes for chunk in chunks),
        "absent": absent,
    }


def _fault(call: Callable[[], None]) -> str:
    """What a call has raised on the first rank where it has, in words; empty if it has on none."""
    words = ""
    try:
        call()
    except Exception as error:  # a rival's fault is a result
        words = f"{type(error).__name__}: {error}"
    found: list[Any] = [words]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, words)
    return next(filter(None, found), "")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.int32), other.contiguous().view(-1).view(torch.int32))


def _measured(training: Training, contender: Callable[[], contextlib.ExitStack]) -> dict[str, Any]:
    for part in training.parts():
        part.zero_()
    span = measure.Span()
    if dist.is_initialized():
        dist.barrier()
    read_bytes, cpu_s, began_s = _bytes_read(), time.process_time(), time.perf_counter()
    with contender():
        found = {"seconds": time.perf_counter() - began_s, "cpu_s": time.process_time() - cpu_s}
        found |= {"peak_bytes": span.peak(), "read_bytes": _bytes_read() - read_bytes}
        if dist.is_initialized():
            dist.barrier()
    return found


def _bytes_read() -> int:
    """By read calls of this process, whether or not a disk was asked."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _contenders(
    training: Training, folder: str, chunks: list[Chunk], right: list[torch.Tensor]
) -> dict[str, Callable[[], contextlib.ExitStack]]:
    """Each loads, and returns what is to be closed afterwards, out of the time that is measured. right: the values, once they are known."""

    def ours() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        ckpt = stack.enter_context(checkpointer(folder, training, read_only=True))
        assert ckpt.restore() == 1
        return stack

    def of_torch() -> contextlib.ExitStack:
        dcp.load(dict(training.live()), storage_reader=dcp.FileSystemReader(f"{folder}/{DCP}"))
        return contextlib.ExitStack()

    def of_peer() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        manager = resharding_peer.manager()
        stack.callback(manager.close)
        manager.load(f"{folder}/{resharding_peer.NAME}", into=training.live(), strict=True)
        return stack

    buffer = bytearray(max((chunk.n_bytes for chunk in chunks), default=0))

    def floor() -> contextlib.ExitStack:
        files: dict[str, int] = {}
        for key, offset, n_bytes in chunks:
            if key not in files:
                files[key] = os.open(f"{folder}/{FASTCKPT}/{key}", os.O_RDONLY)
            assert os.preadv(files[key], [memoryview(buffer)[:n_bytes]], offset) == n_bytes
        for part, value in zip(training.parts(), right, strict=True):
            part.copy_(value)
        stack = contextlib.ExitStack()
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        return stack

    return {FASTCKPT: ours, DCP: of_torch, resharding_peer.NAME: of_peer, FLOOR: floor}
