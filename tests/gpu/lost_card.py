"""A job whose card is lost in the middle of a save: `python -m tests.gpu.lost_card FOLDER`. Says what happened as one line of JSON.

A kernel's failed assertion leaves the CUDA context of the process unusable for good, so this is a process of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from fastckpt.errors import SaveError
from fastckpt.options import Options
from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu.suite.models import mlp

OPTIONS = Options(threads=1, connections=1, host_budget_bytes=128 << 20)
WAIT_S = 60.0


def main(folder: Path) -> None:
    logging.disable(logging.CRITICAL)
    card = torch.device("cuda:0")
    job = mlp(card)
    said: dict[str, Any] = {}

    def attempt(name: str, work: Any) -> None:
        try:
            work()
            said[name] = "returned"
        except BaseException as error:  # what is raised is what is asked for
            said[name] = type(error).__name__
            said[f"{name}: cause"] = type(error.__cause__).__name__

    ckpt = Checkpointer(str(folder / "run"), job.state, every=None, keep=None, spot=None, options=OPTIONS)
    job.step(1)
    ckpt.save_now(1).wait(WAIT_S)
    ckpt.step(1)
    torch.save({name: one.state_dict() for name, one in job.state.items()}, folder / "expected.pt")
    job.step(2)
    torch.cuda._sleep(200_000_000)  # the save begins before the card is lost
    torch.zeros(4, device=card)[torch.tensor([99], device=card)]
    attempt("save", lambda: ckpt.save_now(2).wait(WAIT_S))
    attempt("step", lambda: ckpt.step(2))
    attempt("training", lambda: (job.step(3), torch.cuda.synchronize()))
    attempt("save again", lambda: ckpt.save_now(2).wait(WAIT_S))
    attempt("close", ckpt.close)
    said["SaveError"] = [name for name, what in said.items() if what in {one.__name__ for one in _kinds()}]
    print(json.dumps(said), flush=True)


def _kinds() -> set[type[BaseException]]:
    found, new = {SaveError}, [SaveError]
    while new:
        new = [kind for one in new for kind in one.__subclasses__() if kind not in found]
        found.update(new)
    return found  # type: ignore[return-value]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
