"""What is behind a `TensorReader` of one container."""

from __future__ import annotations

from fastckpt import TensorReader
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.contents import OfContainer


def index_of(reader: TensorReader) -> Reader:
    """Its index."""
    assert isinstance(reader._contents, OfContainer)
    return reader._contents.reader
