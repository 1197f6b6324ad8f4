"""Bytes to fewer bytes and back. Knows no torch, no files and no format; see docs/format.md, section 4."""

from fastckpt.codec.base import CodecError, Encoded
from fastckpt.codec.transforms import decode, encode

__all__ = ["CodecError", "Encoded", "decode", "encode"]
