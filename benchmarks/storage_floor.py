"""What a verified load cannot do without, and what encoding alone takes: of this machine, with the same bytes, in the same rounds.

python -m benchmarks.storage_floor ABOUT '{"state": PATH, "folder": PATH}' OUT
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastckpt
from benchmarks.probes import TRIES, floor
from benchmarks.processes import answer
from fastckpt import codec
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.state.capture import capture
from fastckpt.state.sealing import seal


def encode(state: Any) -> dict[str, float]:
    """Encode the chunks of a state with this machine's threads; stored bytes go nowhere.

    encode_cpu: processor seconds of the codec's calls alone. encode_seconds: of all threads by the clock, with the copies of chunks.
    """
    options = fastckpt.Options()
    sealed = seal(capture(state, pickle, 2))
    n_threads = options.threads

    def some(first: int) -> tuple[float, int]:
        raw_room, out = np.ones(MAX_RAW_BYTES, np.uint8), np.ones(MAX_RAW_BYTES, np.uint8)
        cpu, stored = 0.0, 0
        for number in range(first, len(sealed.chunks), n_threads):
            element = sealed.chunks[number].element
            raw = sealed.source.raw(number, raw_room)
            began = time.thread_time()
            made = codec.encode(raw, element.const_lane_bytes, element.float_lane_bytes, out=out[: raw.size])
            cpu += time.thread_time() - began
            stored += len(made.stored)
            sealed.source.release(number)
        return cpu, stored

    with ThreadPoolExecutor(n_threads) as threads:
        began = time.perf_counter()
        found = list(threads.map(some, range(n_threads)))
        seconds = time.perf_counter() - began
    cpu, stored = (sum(values) for values in zip(*found, strict=True))
    return {"encode_seconds": seconds, "encode_cpu": cpu, "raw_bytes": sealed.n_bytes, "stored_bytes": stored}


def main(_: str, text: str, out: str) -> None:
    before = os.getloadavg()[0]
    given = json.loads(text)
    state = torch.load(given["state"])
    encoded = [encode(state) for _ in range(TRIES)]
    best = {key: min(one[key] for one in encoded) for key in encoded[0]}
    if given.get("encode_only"):
        answer(best, before, out)
    with tempfile.TemporaryDirectory(dir=given["folder"]) as folder:
        file = Path(folder) / "state.fckpt"
        fastckpt.save(state, file)
        del state
        source = torch.from_numpy(np.fromfile(given["state"], np.uint8))
        tries = [floor(source, file) for _ in range(TRIES)]
    answer({**best, **{key: min(one[key] for one in tries) for key in tries[0]}}, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
