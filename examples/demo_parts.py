"""What both demos are made of: a model, a text to learn, a line of progress, and fingerprints that show a single bit."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 128
"""Bytes of text that a sample shows the model."""


def english_text() -> Tensor:
    """The English text that Python ships, as bytes."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()), dtype=torch.int64)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(b, t, width)))
        mlp: Tensor = self.mlp(self.norm2(x))
        mixed: Tensor = x + self.drop(mlp)
        return mixed


class GPT(nn.Module):
    """Byte-level GPT. Input and output embedding are one tensor, so that the checkpoint has a shared storage in it."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Progress:
    """One line that moves on a terminal, a few plain lines elsewhere. On stderr: stdout is for the result."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, max(total, 1), 0
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        self.done += 1
        if self.live:
            full = 24 * self.done // self.total
            print(f"\r{self.what:<10} [{'#' * full}{'.' * (24 - full)}] {text}", end="", file=sys.stderr, flush=True)
        elif self.done == self.total or self.done % max(self.total // 4, 1) == 0:
            print(f"{self.what:<10} {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print(file=sys.stderr)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}/{i}")
    else:
        yield name, value


def fingerprint(state: dict[str, Any]) -> dict[str, str]:
    """One digest for each tensor (its type, shape and bytes) and the exact text of everything else."""
    prints = {}
    for name, value in leaves(state):
        if isinstance(value, Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(data.tobytes()).hexdigest()
            prints[name] = f"{value.dtype} {list(value.shape)} {digest}"
        else:
            text = value.hex() if isinstance(value, float) else repr(value)
            prints[name] = text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()
    return prints


def raw_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors; memory that two of them share counts once."""
    storages = [value.untyped_storage() for _, value in leaves(state) if isinstance(value, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def differences(expected: dict[str, str], found: dict[str, str], what: str) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    bad = [name for name in names if expected.get(name) != found.get(name)]
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return [f"{what}: {len(bad)} of {len(names)} differ: {shown}"] if bad else []
