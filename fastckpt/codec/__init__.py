"""Compresses bytes and restores them. Knows no torch, no files and no format; see docs/format.md, section 4."""

from fastckpt.codec.base import CodecError, Encoded
from fastckpt.codec.choose import Coding, Effort, choose
from fastckpt.codec.transforms import decode, encode, encode_as, encode_into

__all__ = ["CodecError", "Coding", "Effort", "Encoded", "choose", "decode", "encode", "encode_as", "encode_into"]
