"""One rank of the demo with several ranks: `demo_ranks.py` starts it, and reads what it says on stdout, one JSON object a line."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from demo_parts import CONTEXT, GPT, english_text, fingerprint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import fastckpt

SEED = 20
BATCH = 12
"""Samples of an optimizer step, of all ranks together: it stays the same when the number of ranks changes."""
EVERY = 5
"""Steps between checkpoints."""
WIDTH, LAYERS, HEADS = 128, 2, 4  # 0.4 M parameters: even a busy laptop trains them on four ranks at once
CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")
"""Whether FSDP2 of this torch trains on a CPU: that of 2.6 does not."""
WRAPPER = "FSDP2" if CAN_SHARD else "DistributedDataParallel"


def samples_of(steps: int) -> int:
    """Samples of the epoch, so that it has this many steps. The last one is smaller than the others, and no number of ranks divides it."""
    return steps * BATCH - 5


class Windows(Dataset[tuple[int, Tensor]]):
    """A number, and the part of the text that it stands for. NumPy's generator, one for each rank, shifts each part by some bytes."""

    def __init__(self, n: int) -> None:
        self.n, self.text = n, english_text()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        start = number * CONTEXT % (len(self.text) - 2 * CONTEXT) + int(np.random.randint(CONTEXT))
        return number, self.text[start : start + CONTEXT]


class Training:
    """What is trained and saved, on this rank."""

    def __init__(self, steps: int) -> None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(SEED)  # parameters are the same on all ranks
        self.model = wrapped(GPT(WIDTH, LAYERS, HEADS))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=steps + 1)
        data = Windows(samples_of(steps))
        self.sampler = fastckpt.ElasticSampler(data, batch_size=BATCH, seed=SEED)
        # Each pass over a loader draws a number. It takes it from here, and not from the generator that dropout uses.
        self.loader = DataLoader(data, batch_sampler=self.sampler, generator=torch.Generator())
        own = SEED + dist.get_rank()  # each rank drops other values, and shifts by other bytes
        random.seed(own)
        np.random.seed(own)
        torch.manual_seed(own)

    @property
    def parts(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.sampler,
            "rng": fastckpt.RNGState(),
        }

    def step(self, numbers: Tensor, windows: Tensor) -> dict[str, Any]:
        """One optimizer step. This rank's samples, and its part of the mean loss over all samples of the step."""
        weight = self.sampler.weight()  # parts may differ by a sample
        loss = functional.cross_entropy(self.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()) * weight
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return {"samples": numbers.tolist() if weight else [], "loss": loss.item()}

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Of whole tensors, which do not depend on how many ranks share them; and of what this rank has for itself. Called by all ranks."""
        found = {name: fingerprint({name: whole(part.state_dict())}) for name, part in self.parts.items()}
        own = found.pop("rng")
        return {"own": own, "shared": {key: value for prints in found.values() for key, value in prints.items()}}


def wrapped(net: GPT) -> nn.Module:
    """For several ranks: each holds a part of every parameter, or, where that trains on GPUs alone, all of them."""
    if not CAN_SHARD:
        return nn.parallel.DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(value: Any) -> Any:
    """Parts of tensors become what all ranks hold together."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(one) for one in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def say(kind: str, **what: Any) -> None:
    print(json.dumps({"kind": kind, "at": time.time(), **what}), flush=True)


def say_state(training: Training, when: str) -> None:
    """All ranks hold the same wholes: rank 0 tells them."""
    found = training.fingerprints()
    say(when, own=found["own"], shared=found["shared"] if dist.get_rank() == 0 else {})


def same_place(name: str, states: Sequence[Any], rank: int, world: int) -> Any:
    """What becomes of generators on another number of ranks: each rank goes on with those of the saved rank of its number."""
    return states[rank % len(states)]


def train(training: Training, args: argparse.Namespace) -> None:
    parts = {name: part for name, part in training.parts.items() if name != args.forget}
    every = fastckpt.Every(steps=EVERY) if args.saves else None
    with fastckpt.Checkpointer(args.url, parts, every=every, spot=None, keep=None, reassign=same_place) as ckpt:
        began_s = time.monotonic()
        step = ckpt.restore()
        say("restored", step=step, seconds=time.monotonic() - began_s)
        say_state(training, "state at first")
        while step < args.steps:
            for numbers, windows in training.loader:
                done = training.step(numbers, windows)
                step += 1
                ckpt.step(step)
                if args.saves and step == EVERY:
                    ckpt.save_now(step).wait()  # however slow the machine is: there has to be something to go on from
                if args.forget == "data":
                    training.sampler.advance()  # where the Checkpointer knows the sampler, it counts
                say("step", step=step, **done, durable=ckpt.stats.durable_step)
                if args.saves and step % EVERY == 0:
                    say_state(training, f"state at {step}")
                if step == args.steps:
                    break
        if args.saves:
            ckpt.save_now(step).wait()
    say_state(training, "state at last")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--saves", action="store_true", help="save every few steps, and at the end")
    parser.add_argument("--forget", help="leave this part out of the checkpoint")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    train(Training(args.steps), args)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
