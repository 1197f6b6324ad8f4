"""Write repository/: a small repository with everything that version 1 has, as fastckpt 0.1.0 writes it.

    python -m tests.golden.make_repository

Run once. Later versions must read what lies there, so it is never written anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.repository_records import Commit, Pin, pin_bytes, utc_now
from fastckpt.format.sealed import seal
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.writing.rank import SaveAsked
from tests.support.repositories import IN_PARALLEL, begin, reuse, save_ranks, vote
from tests.support.states import sealed

ROOT = Path(__file__).resolve().parent / "repository"


def state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 20, generator=generator)
    return {
        "weight": weight,
        "half": weight.bfloat16(),
        "view": weight[3:5],
        "zeros": torch.zeros(300),
        "step": torch.tensor(seed),
        "ids": torch.arange(seed, seed + 9),
        "note": f"seed {seed}",
    }


def write(store: Store) -> None:
    """Epoch 1: steps 1 (retired), 2, 3. Epoch 2: a rewind to 2; 3, 4. Epoch 3: two ranks, a shared pack, an unfinished save, pins."""
    job = Incarnation(Repository(store), IN_PARALLEL)
    job.choose_and_claim()
    for step in (1, 2, 3):
        job.save(
            sealed(state(step)), SaveAsked(step, metrics={"loss": 1 / step, "odd": float("nan")}, meta={"note": "µ"})
        )
        job.retain(Keep(last=2), grace_s=0.0)
    job = Incarnation(Repository(store), IN_PARALLEL)
    job.choose_and_claim(2)
    for step in (3, 4):
        commit = job.save(sealed(state(10 + step)), step)
    found = Repository(store).commit(CheckpointId(2, 4))
    assert isinstance(found, Commit), commit
    begin(store, 2, found)
    save_ranks(store, 3, 5, [state(20), state(21)], found)
    vote(store, 3, 6, 1, 2, state(23))
    vote(store, 3, 7, 0, 1, state(24), found)
    reuse_from(store)
    store.put(keys.pin_key("reader"), pin_bytes(Pin(CheckpointId(1, 2), 1 << 40, "a test", utc_now())))
    later = {"epoch": 1, "step": 3, "expires_s": 1, "owner": "a later version", "utc": utc_now(), "colour": "blue"}
    store.put(keys.pin_key("later"), seal("pin", later))


def reuse_from(store: Store) -> None:
    """Step 7 commits, and step 8 names only its packs."""
    from fastckpt.repository.commit import try_commit

    assert try_commit(store, SaveId(3, 7, 0)) is not None
    reuse(store, 7, 8, epoch=3)


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    write(LocalStore(ROOT / "run"))
    from tests.golden.repository_decoder import Repository as Decoder

    found = Decoder(ROOT / "run")
    expected = {
        "history": found.history(),
        "tombstones": sorted(found.tombstones),
        "commits": [
            {
                "checkpoint": checkpoint,
                "ranks": [
                    {json.dumps(name): hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
                    for tensors in (found.read(checkpoint, rank) for rank in range(commit["world"]))
                ],
            }
            for checkpoint, commit in sorted(found.commits.items())
        ],
    }
    (ROOT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
