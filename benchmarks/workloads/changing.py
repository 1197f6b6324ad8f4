"""Runs whose states change in the ways that deltas meet: pre-training, fine-tuning of real weights, LoRA, frozen layers, sparse rows.

Every run computes in float32 on this machine's CPU and rounds as training in mixed precision does: the forward pass sees weights in
bfloat16, gradients are rounded to bfloat16, and an optimizer updates float32 masters ("mixed") or the bfloat16 weights themselves ("bf16").
All seeds are fixed.

    task (weights, loss) + precision ─→ Run ─→ step() … state(form)
"""

from __future__ import annotations

import abc
import functools
import math
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from benchmarks import codec_data
from benchmarks.workloads import gpt

SEED = 11
QUICK_CHARACTERS = 1 << 18
Weights = dict[str, Tensor]


class Task(abc.ABC):
    """What is trained: weights in float32, which of them, and the loss of the next batch."""

    lr = 1e-3
    betas = (0.9, 0.999)
    decay = 0.01
    warm = 20
    """Steps in which the rate rises to `lr`."""
    batch = gpt.BATCH
    """Examples in a step."""

    @abc.abstractmethod
    def weights(self) -> Weights: ...

    @abc.abstractmethod
    def loss(self, weights: Weights) -> Tensor: ...

    @staticmethod
    def trains(name: str) -> bool:
        """Whether the optimizer has this weight."""
        return True

    def optimizer(self, weights: Weights) -> torch.optim.Optimizer:
        decayed = [t for t in weights.values() if t.dim() > 1]
        rest = [t for t in weights.values() if t.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, foreach=True)


class Pretraining(Task):
    """A GPT on the sources of Python's standard library."""

    betas, decay, warm = (0.9, 0.95), 0.1, 50

    def __init__(self, lr: float, quick: bool) -> None:
        self.lr = lr
        self.size = gpt.Size(32, 1, 2, 1) if quick else gpt.Size(320, 6, 10, 1)
        self.text = words_as_numbers(gpt.VOCABULARY, QUICK_CHARACTERS if quick else None)

    def weights(self) -> Weights:
        self.model = gpt.GPT(self.size)
        for name, parameter in self.model.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.size.layers))
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def loss(self, weights: Weights) -> Tensor:
        at = torch.randint(len(self.text) - gpt.CONTEXT - 1, (self.batch,)).tolist()
        rows = torch.stack([self.text[i : i + gpt.CONTEXT + 1] for i in at])
        logits = functional_call(self.model, weights, (rows[:, :-1],), tie_weights=True)
        return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


class FineTuning(Task):
    """MiniLM-L6, 22.6 M trained weights: two passes of a sentence with other dropout shall mean the same."""

    lr, batch = codec_data.LR, codec_data.BATCH

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.text = torch.tensor(codec_data.sentences(cache))

    def weights(self) -> Weights:
        found = codec_data.load_minilm(self.cache)
        kept = {n.removeprefix("bert."): t.clone().float() for n, t in found.items()}
        return {n: t for n, t in kept.items() if not n.startswith("pooler")}

    def loss(self, weights: Weights) -> Tensor:
        ids = self.text[torch.randint(len(self.text), (self.batch,))]
        both, half = codec_data.embed(weights, torch.cat([ids, ids])), self.batch
        return functional.cross_entropy(both[:half] @ both[half:].T / 0.3, torch.arange(half))


class FrozenBackbone(FineTuning):
    """The last two of six layers train."""

    lr = 1e-4

    @staticmethod
    def trains(name: str) -> bool:
        return name.startswith(("encoder.layer.4.", "encoder.layer.5."))


class Lora(FineTuning):
    """Adapters of rank 8 at the queries and values of every layer train, nothing else."""

    lr, rank = 1e-4, 8

    def weights(self) -> Weights:
        found = super().weights()
        for name in [n for n in found if n.endswith(("self.query.weight", "self.value.weight"))]:
            width = found[name].shape[1]
            found[f"{name}.lora_a"] = nn.init.kaiming_uniform_(torch.empty(self.rank, width), a=math.sqrt(5))
            found[f"{name}.lora_b"] = torch.zeros(found[name].shape[0], self.rank)
        return found

    @staticmethod
    def trains(name: str) -> bool:
        return ".lora_" in name

    def loss(self, weights: Weights) -> Tensor:
        merged = {n: t for n, t in weights.items() if ".lora_" not in n}
        for name in [n.removesuffix(".lora_a") for n in weights if n.endswith(".lora_a")]:
            merged[name] = merged[name] + 2 * weights[f"{name}.lora_b"] @ weights[f"{name}.lora_a"]
        return super().loss(merged)


class SparseEmbeddings(Task):
    """Two tables of word vectors: only the rows of the words of a batch change, and only their moments."""

    warm, batch, noise, width = 1, 512, 5, 96

    def __init__(self, quick: bool) -> None:
        self.rows = 1 << (10 if quick else 16)
        self.text = words_as_numbers(self.rows, QUICK_CHARACTERS if quick else None)
        counts = torch.bincount(self.text, minlength=self.rows).double() ** 0.75
        self.often = counts.cumsum(0) / counts.sum()

    def weights(self) -> Weights:
        table = (torch.rand(self.rows, self.width) - 0.5) / self.width
        return {"words.weight": table, "contexts.weight": torch.zeros(self.rows, self.width)}

    def optimizer(self, weights: Weights) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(list(weights.values()), lr=self.lr, betas=self.betas)

    def loss(self, weights: Weights) -> Tensor:
        at = torch.randint(5, len(self.text) - 5, (self.batch,))
        far = torch.randint(1, 6, (self.batch,)) * (2 * torch.randint(2, (self.batch,)) - 1)
        noise = torch.searchsorted(self.often, torch.rand(self.batch, self.noise, dtype=torch.double))
        others = torch.cat([self.text[at + far][:, None], noise.clamp_(max=self.rows - 1)], 1)
        words = functional.embedding(self.text[at], weights["words.weight"], sparse=True)
        contexts = functional.embedding(others, weights["contexts.weight"], sparse=True)
        scores = (contexts @ words[:, :, None]).squeeze(2)
        return -(functional.logsigmoid(scores[:, 0]).mean() + functional.logsigmoid(-scores[:, 1:]).sum(1).mean())


@functools.cache
def words_as_numbers(vocabulary: int, characters: int | None) -> Tensor:
    """The sources of Python's standard library, its words numbered from the commonest on; 0 stands for the rest.

    characters: how many at the beginning; None: all.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = "\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py")))[:characters]
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    known = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return torch.from_numpy(np.fromiter((known.get(word, 0) for word in words), np.int64, len(words)))


def _order(optimizer: torch.optim.Optimizer, weights: Weights) -> list[str]:
    """Names of the weights, in the order in which an optimizer numbers them."""
    names = {id(tensor): name for name, tensor in weights.items()}
    return [names[id(tensor)] for group in optimizer.param_groups for tensor in group["params"]]


class Run:
    """One training. precision: "mixed": float32 masters and their bfloat16 copy; "bf16": bfloat16 weights and moments."""

    def __init__(self, task: Task, precision: str) -> None:
        torch.manual_seed(SEED)
        self.task, self.number = task, 0
        weights = dict(sorted(task.weights().items()))
        own = torch.float32 if precision == "mixed" else torch.bfloat16
        self.copy = {n: t.bfloat16() for n, t in weights.items()} if precision == "mixed" else None
        self.masters = {n: t.to(own) for n, t in weights.items()}
        self.trained = {n: t for n, t in self.masters.items() if task.trains(n)}
        self.optimizer = task.optimizer(self.trained)

    def step(self) -> float:
        """One step of training; its loss."""
        self.number += 1
        weights = {n: t.float() for n, t in (self.copy or self.masters).items()}
        for name in self.trained:
            weights[name] = weights[name].detach().requires_grad_()
        loss = self.task.loss(weights)
        loss.backward()
        leaves = {n: weights[n] for n in self.trained}
        if not any(t.grad is not None and t.grad.is_sparse for t in leaves.values()):
            nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        for name, tensor in self.trained.items():
            gradient = leaves[name].grad
            tensor.grad = None if gradient is None else gradient.bfloat16().to(tensor.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.lr * min(1.0, self.number / self.task.warm)
        self.optimizer.step()
        for name, tensor in self.trained.items():
            if self.copy is not None:
                self.copy[name].copy_(tensor)
        return loss.item()

    def resume(self, everything: dict[str, Any], number: int) -> None:
        """Go on from what `all` has returned after step `number`; batches come in another order than they did then."""
        for mine, found in ((self.masters, everything["masters"]), (self.copy or {}, everything["copy"] or {})):
            for name, tensor in mine.items():
                tensor.copy_(found[name])
        trained = {
            n: t for n, t in everything["masters"].items() if self.task.trains(n)
        }  # in the order of that process
        then = _order(self.task.optimizer(trained), trained)
        found = {name: everything["optimizer"]["state"][i] for i, name in enumerate(then)}
        state = {i: found[name] for i, name in enumerate(_order(self.optimizer, self.trained))}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.number = number

    def objects(self, form: str) -> dict[str, Any]:
        """What a Checkpointer is given, for states as `state` returns them."""
        return {**self.state(form), **({} if form == "weights" else {"optimizer": self.optimizer})}

    def all(self) -> dict[str, Any]:
        """Everything, as live tensors; `formed` makes a form of it."""
        return {"masters": self.masters, "copy": self.copy, "optimizer": self.optimizer.state_dict()}

    def state(self, form: str) -> dict[str, Any]:
        """What a checkpoint of this form holds, as live tensors."""
        return formed(self.all(), form, self.task.trains)


def formed(everything: dict[str, Any], form: str, trains: Callable[[str], bool]) -> dict[str, Any]:
    """A form of `Run.all()`.

    form: "fp32": masters alone; "copy": trained masters and a bfloat16 copy of all; "weights": that copy without an optimizer; "bf16": as
    "fp32", of a run of that precision.
    """
    masters, optimizer = everything["masters"], everything["optimizer"]
    if form == "weights":
        return {"model": everything["copy"]}
    if form != "copy":
        return {"model": masters, "optimizer": optimizer}
    trained = {n: t for n, t in masters.items() if trains(n)}
    return {"model": everything["copy"], "master": trained, "optimizer": optimizer}


GAPS = (1, 10, 50, 100)
FIRST = {"pretraining-1e-3": 150, "pretraining-3e-4": 150, "fine-tuning": 100, "lora": 50, "frozen": 50, "sparse": 200}
FIRST_BF16 = {**FIRST, "pretraining-1e-3": 60, "pretraining-3e-4": 60, "fine-tuning": 20, "lora": 10, "frozen": 10}
"""The step after which the first state is taken; of runs in bfloat16 earlier, to keep the time short."""
TASKS: dict[str, Callable[[Path, bool], Task]] = {
    "pretraining-1e-3": lambda cache, quick: Pretraining(1e-3, quick),
    "pretraining-3e-4": lambda cache, quick: Pretraining(3e-4, quick),
    "fine-tuning": lambda cache, quick: FineTuning(cache),
    "lora": lambda cache, quick: Lora(cache),
    "frozen": lambda cache, quick: FrozenBackbone(cache),
    "sparse": lambda cache, quick: SparseEmbeddings(quick),
}
_TRAINED = {"lora": Lora, "frozen": FrozenBackbone}
PRECISIONS = {"fp32": "mixed", "copy": "mixed", "weights": "mixed", "bf16": "bf16"}
"""Form of a state → precision of the run that it is from."""


def forms(name: str) -> list[str]:
    """Of a task's states."""
    return [form for form in PRECISIONS if form != "weights" or name == "fine-tuning"]


def trains(name: str) -> Callable[[str], bool]:
    """Which weights a task's optimizer has."""
    return _TRAINED.get(name, Task).trains


def first_step(name: str, precision: str, quick: bool) -> int:
    """The step after which the first state of that training is taken."""
    return 2 if quick else (FIRST if precision == "mixed" else FIRST_BF16)[name]


def cached(name: str, precision: str, cache: Path, quick: bool) -> Path:
    """The folder with the states `GAPS` steps apart from the first one (0.pt, 1.pt, …); made now if it is not there."""
    folder = cache / "changing" / f"{name}-{precision}{'-quick' if quick else ''}-{SEED}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in another order would make other states
    run = Run(TASKS[name](cache, quick), precision)
    first = first_step(name, precision, quick)
    for number in range(1, first + GAPS[-1] + 1):
        loss = run.step()
        codec_data.say(f"{name}, {precision}: step {number}/{first + GAPS[-1]}, loss {loss:.3f}")
        if number - first in (0, *GAPS):
            torch.save(run.all(), folder / f"{number - first}.pt")
    codec_data.say("")
    (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    cached(sys.argv[1], sys.argv[2], Path(sys.argv[3]), len(sys.argv) > 4)
