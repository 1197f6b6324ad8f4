"""Write codec_data.npz: slices of real training states, for test_codec_ratios.py.

    python -m tests.properties.make_codec_data CACHE     CACHE: benchmarks/.cache/codec, as benchmarks/codec.py leaves it

Run once. 64 Ki numbers of each kind, from the middle of the state: a small GPT trained here, and a fine-tuned MiniLM's working copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

N = 65536
SLICES = {
    "params bf16": ("gpt-bf16/gpt-bf16-params", None),
    "params fp32": ("gpt-fp32/gpt-fp32-params", None),
    "exp_avg bf16": ("gpt-bf16/gpt-bf16-exp_avg", None),
    "exp_avg fp32": ("gpt-fp32/gpt-fp32-exp_avg", None),
    "exp_avg_sq bf16": ("gpt-bf16/gpt-bf16-exp_avg_sq", None),
    "exp_avg_sq fp32": ("gpt-fp32/gpt-fp32-exp_avg_sq", None),
    "fine-tuned bf16, 1 step": ("fine-tuning/ft-bf16", "fine-tuning/ft-bf16-1"),
    "fine-tuned bf16, 50 steps": ("fine-tuning/ft-bf16", "fine-tuning/ft-bf16-50"),
}


def main() -> None:
    cache = Path(sys.argv[1])
    arrays = {}
    for name, (new, old) in SLICES.items():
        for suffix, file in (("", new), (", base", old)):
            if file is not None:
                lanes = np.load(cache / f"{file}.npy", mmap_mode="r")
                start = len(lanes) // 2 // 64 * 64
                arrays[name + suffix] = np.ascontiguousarray(lanes[start : start + N])
    # The table's rows that no token has reached are zeros: a stretch with both.
    table = np.load(cache / "gpt-fp32/gpt-fp32-exp_avg_sq-table.npy", mmap_mode="r")
    shares = [float(np.mean(table[i : i + N] == 0)) for i in range(0, len(table) - N, N)]
    at = int(np.argmin(np.abs(np.array(shares) - 0.6))) * N
    arrays["exp_avg_sq fp32, zero rows"] = np.ascontiguousarray(table[at : at + N])
    np.savez_compressed(Path(__file__).with_name("codec_data.npz"), **arrays)


if __name__ == "__main__":
    main()
