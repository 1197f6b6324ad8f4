"""Streams to zstd frames and back with the zstd library; every declared length is checked before it is used.

Our own encoder (kernels.encode) is several times faster. This module is for chunks in which matches pay, for machines without native
kernels, and for frames of other writers. Without native kernels, libzstd is configured as little more than an entropy coder:
`strategy=FAST` with a 64-entry hash table and 7-byte matches. The match finder of the ordinary levels finds junk matches in exponents and
pays for them: 0.682 of raw bytes at level 1 against 0.665 here for bf16 weights, at half the speed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import zstandard

from fastckpt.codec.base import CodecError

MAX_WINDOW_BYTES = 8 << 20


class _Contexts(threading.local):
    """zstandard's objects must not be shared between threads."""

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            compression_level=1,
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            chain_log=6,
            min_match=7,
            target_length=0,
            window_log=17,
            write_content_size=1,
            write_checksum=0,
            write_dict_id=0,
        )
        self.entropy_only = zstandard.ZstdCompressor(compression_params=parameters)
        self.by_level: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)


_contexts = _Contexts()


def compress(stream: Any, level: int | None = None, cuts: Sequence[int] = ()) -> bytes:
    """Compress the stream into one standard zstd frame; level: of the match search, None: no matches. Releases the GIL.

    cuts: positions where a block ends, ascending; only used without matches. Two planes in one block would share a Huffman table, which
    compresses both worse.
    """
    if level is None:
        if not cuts:
            return _contexts.entropy_only.compress(stream)
        view = memoryview(stream)
        maker = _contexts.entropy_only.compressobj(size=view.nbytes)
        parts = []
        for start, end in itertools.pairwise((0, *cuts, view.nbytes)):
            parts.append(maker.compress(view[start:end]))
            if end < view.nbytes:
                parts.append(maker.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        return b"".join([*parts, maker.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)])
    compressor = _contexts.by_level.get(level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_content_size=True, write_dict_id=False
        )
        _contexts.by_level[level] = compressor
    return compressor.compress(stream)


def content_bytes(frame: Any) -> int:
    """The content size that a frame declares; CodecError if it declares none or is no frame."""
    head = bytes(memoryview(frame)[:4])
    if head != zstandard.MAGIC_NUMBER.to_bytes(4, "little"):
        raise CodecError("a zstd frame", f"bytes that start with {head.hex()}")
    try:
        size = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise CodecError("a zstd frame", f"an unreadable frame header ({error})") from error
    if size >= zstandard.CONTENTSIZE_ERROR:
        raise CodecError("a frame with its content size", "none")
    return int(size)


def decompress(frame: Any, stream_bytes: int) -> bytes:
    """The content of exactly one frame of exactly `stream_bytes` bytes; CodecError for anything else. Releases the GIL.

    Allocates `stream_bytes`, never a size that only the frame declares.
    """
    found = content_bytes(frame)
    if found != stream_bytes:
        raise CodecError(f"a frame of {stream_bytes} bytes", f"a frame of {found} bytes")
    declared = zstandard.get_frame_parameters(frame)
    if declared.window_size > MAX_WINDOW_BYTES:
        raise CodecError(f"a window of at most {MAX_WINDOW_BYTES} bytes", f"{declared.window_size}")
    if declared.dict_id:
        raise CodecError("a frame without a dictionary", f"dictionary {declared.dict_id}")
    try:
        stream = _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError("one whole zstd frame", str(error)) from error
    if len(stream) != stream_bytes:
        raise CodecError(f"{stream_bytes} bytes in the frame", f"{len(stream)}")
    return stream
