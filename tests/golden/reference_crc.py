"""CRC-64/NVME for the reference decoders: NumPy, no code of fastckpt."""

from __future__ import annotations

from functools import lru_cache, reduce
from operator import xor

import numpy as np
from numpy.typing import NDArray


def _crc_table() -> NDArray[np.uint64]:
    polynomial = np.uint64(0x9A6C9329AC4BC9B5)  # 0xAD93D23594C93659 reflected
    table = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ polynomial, table >> 1)
    return table


CRC_TABLE = _crc_table()
CRC_LIST: list[int] = CRC_TABLE.tolist()
CRC_BLOCK = 1024


@lru_cache
def _crc_shift() -> list[list[int]]:
    """Tables that advance a state over CRC_BLOCK zero bytes, by the state's eight bytes: the CRC is linear."""
    state = np.arange(256, dtype=np.uint64)[None, :] << (np.arange(8, dtype=np.uint64) * 8)[:, None]
    for _ in range(CRC_BLOCK):
        state = CRC_TABLE[state & 255] ^ (state >> 8)
    return state.tolist()  # type: ignore[no-any-return]


def crc64nvme(data: bytes) -> int:
    """CRC-64/NVME. Blocks go through NumPy side by side, each from state 0, and are then joined."""
    state, blocks = (1 << 64) - 1, len(data) // CRC_BLOCK
    if blocks:
        columns = np.frombuffer(data, "u1", blocks * CRC_BLOCK).reshape(blocks, CRC_BLOCK).T.astype(np.uint64)
        sums = np.zeros(blocks, np.uint64)
        for column in columns:
            sums = CRC_TABLE[(sums ^ column) & 255] ^ (sums >> 8)
        for block_sum in sums.tolist():
            shifted = [table[state >> 8 * k & 255] for k, table in enumerate(_crc_shift())]
            state = reduce(xor, shifted, block_sum)
    for byte in data[blocks * CRC_BLOCK :]:
        state = CRC_LIST[(state ^ byte) & 255] ^ (state >> 8)
    return state ^ ((1 << 64) - 1)
