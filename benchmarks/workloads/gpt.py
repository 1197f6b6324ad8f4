"""A GPT after real training steps, as the state that every contender stores.

Word-level vocabulary over the English text that Python ships (``pydoc_data.topics``), AdamW, tied embeddings, scheduler
and generator states. Random tensors would not do: what a compressing contender gains depends on the exponents of real
weights and moments.

    python -m benchmarks.workloads.gpt SIZE PATH
"""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SEED = 7
VOCABULARY, CONTEXT, BATCH = 4096, 128, 4


@dataclasses.dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    steps: int


SIZES = {
    "42m": Size(640, 8, 10, 40),  # 42.1 M parameters, 505 MB of state
    "21m": Size(512, 6, 8, 12),  # 21.2 M parameters, 254 MB of state
    "4m": Size(192, 8, 6, 12),  # 4.4 M parameters, 52 MB: for a smoke test
    "2m": Size(128, 6, 4, 12),  # 1.7 M parameters, 21 MB: a small model's save over a long way
    "tiny": Size(32, 1, 2, 1),  # 2 MB, for rehearsals
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        w, self.heads = size.width, size.heads
        self.norm1, self.norm2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.qkv, self.out = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.mlp = nn.Sequential(nn.Linear(w, 4 * w), nn.GELU(), nn.Linear(4 * w, w))

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, w))
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp


class GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, size.width), nn.Embedding(CONTEXT, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def tokens() -> Tensor:
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|\s+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    known = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1))}
    return torch.tensor([known.get(word, 0) for word in words])


class Training:
    """A run of this workload: what a training loop holds, and one of its steps."""

    def __init__(self, name: str, batch: int = BATCH) -> None:
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        self.batch = batch
        self.text, self.model = tokens(), GPT(SIZES[name])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, start_factor=0.1, total_iters=10)
        self.progress: dict[str, Any] = {"step": 0, "losses": []}

    def step(self) -> float:
        """One step; its loss."""
        at = torch.randint(len(self.text) - CONTEXT - 1, (self.batch,)).tolist()
        rows = torch.stack([self.text[i : i + CONTEXT + 1] for i in at])
        loss = functional.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        value = loss.item()
        self.progress["step"] += 1
        self.progress["losses"].append(value)
        return value

    def state(self) -> dict[str, Any]:
        _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": self.progress,
            "rng": {
                "torch": torch.get_rng_state(),
                "python": random.getstate(),
                "numpy": {
                    "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                    "rest": (int(position), int(has_gauss), float(gauss)),
                },
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; the generators stay as they are."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress = {"step": state["progress"]["step"], "losses": list(state["progress"]["losses"])}


def build(name: str) -> dict[str, Any]:
    size = SIZES[name]
    training = Training(name)
    for step in range(size.steps):
        loss = training.step()
        print(f"workload {name}: step {step + 1}/{size.steps}  loss {loss:.3f}", file=sys.stderr, flush=True)
    return training.state()


def main(name: str, path: str) -> None:
    start = time.monotonic()
    state = build(name)
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(place)
    print(f"workload {name}: {place.stat().st_size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
