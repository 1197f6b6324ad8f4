"""What the fault tests share: a state with something of everything, and containers with a part replaced and all sums right."""

from __future__ import annotations

import io
import os
import pickle
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastckpt
from fastckpt.errors import CheckpointError
from fastckpt.format.container import FOOTER_BYTES, HEADER_BYTES, PartEntry, build_footer, build_header, parse_footer
from fastckpt.format.digest import digest
from tests.support.readers import index_of

SEED = int(os.environ.get("FASTCKPT_TEST_SEED", "20250101"))
ARRAY_GLOBALS: list[Any] = [
    np.ndarray,
    np.dtype,
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    *{type(np.dtype(code)) for code in "bBhHiIqQefdFD?"},
]


def seeded(salt: str) -> random.Random:
    """A generator of its own for each test; the seed is printed so that pytest shows it with a failure."""
    print(f"FASTCKPT_TEST_SEED={SEED} ({salt})")
    return random.Random(f"{SEED} {salt}")


def rich_state() -> dict[str, Any]:
    """Floats (ROT), integers (RAW), bundles, constants, arrays, ties; about 180 KiB."""
    generator = torch.Generator().manual_seed(1)

    def normal(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(n, generator=generator).to(dtype)

    weight = normal(9000)
    return {
        "weight": weight,
        "tied": weight,
        "view": weight[10:200:3],
        "half": normal(7000, torch.bfloat16),
        "small": [normal(50), normal(60), normal(70).requires_grad_()],
        "ints": torch.randint(-(1 << 40), 1 << 40, (3000,), generator=generator),
        "bytes": torch.randint(0, 255, (5000,), generator=generator, dtype=torch.uint8),
        "zeros": torch.zeros(5000),
        "ones": torch.ones(300, dtype=torch.int32),
        "complex": torch.complex(normal(900), normal(900)),
        "array": np.random.default_rng(1).standard_normal((100, 100)),
        "step": 7,
    }


def container_of(state: Any) -> bytes:
    out = io.BytesIO()
    fastckpt.save(state, out)
    return out.getvalue()


@dataclass
class Parts:
    """A container taken apart. `build` puts it together with every checksum of the index right."""

    payload: bytes
    directory: bytes
    file_table: bytes
    records: bytes
    skeleton: bytes
    header: bytes = field(default_factory=build_header)

    @classmethod
    def of(cls, data: bytes) -> Parts:
        footer = parse_footer(data[-FOOTER_BYTES:], len(data), "good")
        cut = [data[part.offset : part.offset + part.n_bytes] for part in footer.parts.values()]
        return cls(data[HEADER_BYTES : footer.payload_end], *cut)

    def build(self) -> bytes:
        position = HEADER_BYTES + len(self.payload)
        entries = []
        parts = (self.directory, self.file_table, self.records, self.skeleton)
        for part in parts:
            entries.append(PartEntry(position, len(part), digest(part)))
            position += len(part)
        footer = build_footer(entries, len(self.payload), self.header)
        return b"".join((self.header, self.payload, *parts, footer))


def fetch_all(source: Any) -> dict[str, Any]:
    """Every tensor by name, and every error instead of one. What `open` raises is raised."""
    found: dict[str, Any] = {}
    with fastckpt.open(source) as reader:
        for entry in index_of(reader).directory.tensors:
            try:
                found[str(entry.name)] = reader[entry.name]
            except Exception as error:  # the caller judges it
                found[str(entry.name)] = error
    return found


def allowed(error: BaseException) -> bool:
    """Whether a hostile file may end a load so: our errors, torch's refusal, and RuntimeError from torch's own functions."""
    if isinstance(error, (CheckpointError, pickle.UnpicklingError)):
        return True
    return type(error) in (RuntimeError, NotImplementedError, UserWarning)  # warnings of torch are errors here


def outcome(call: Any, *arguments: Any) -> BaseException | None:
    """The exception of a call, or None."""
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


def as_path(folder: Path, data: bytes) -> Path:
    path = folder / "hostile.fckpt"
    path.write_bytes(data)
    return path
