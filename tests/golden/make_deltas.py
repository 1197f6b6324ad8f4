"""Write deltas/: a repository whose checkpoints name packs of earlier saves, with every transform that has a base but REF.

    python -m tests.golden.make_deltas

Run once. Later versions must read what lies there, so it is never written anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from tests.golden.repository_decoder import Repository as Decoder
from tests.support.deltas import chain

ROOT = Path(__file__).resolve().parent / "deltas"
STEPS, WORLD = 4, 2


def write(store: Store) -> None:
    """Steps 1 to 4 of two ranks, each against the one before."""
    chain(store, STEPS, WORLD)


def digests(found: Decoder, step: int) -> list[dict[str, str]]:
    """Of each rank: the digest of every tensor, by its name."""
    ranks: list[dict[tuple[Any, ...], Any]] = [found.read((1, step), rank) for rank in range(WORLD)]
    return [
        {json.dumps(name): hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
        for tensors in ranks
    ]


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    write(LocalStore(ROOT / "run"))
    found = Decoder(ROOT / "run")
    expected = {str(step): digests(found, step) for step in range(1, STEPS + 1)}
    (ROOT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
