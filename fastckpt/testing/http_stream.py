"""Reads HTTP/1.1 messages from a socket piece by piece: just the part of the protocol that `fault_proxy` and `null_server` need."""

from __future__ import annotations

import mmap
import socket
import ssl
import sys
from collections.abc import Iterator

PIECE_BYTES = 1 << 18
_MAX_HEAD = 1 << 16
_SKIP_BYTES = 8 << 20
# Linux throws such bytes away in the kernel (tcp(7)): they are never copied, and the memory below is never touched.
_SKIP_FLAGS = socket.MSG_TRUNC | socket.MSG_WAITALL if sys.platform == "linux" else 0


class HttpStream:
    """A socket read through a buffer."""

    def __init__(self, source: socket.socket) -> None:
        self.socket = source
        self._rest = b""
        self._scratch: mmap.mmap | None = None

    def some(self, most: int) -> bytes:
        """Read 1 to `most` bytes. EOFError."""
        piece = self._rest[:most] if self._rest else self.socket.recv(min(most, PIECE_BYTES))
        self._rest = self._rest[len(piece) :]
        if not piece:
            raise EOFError
        return piece

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as `view` has room for. EOFError."""
        at = min(view.nbytes, len(self._rest))
        view[:at] = self._rest[:at]
        self._rest = self._rest[at:]
        while at < view.nbytes:
            n = self.socket.recv_into(view[at:])
            if not n:
                raise EOFError
            at += n

    def skip(self, most: int) -> int:
        """Read 1 to `most` bytes and forget them; returns their number. EOFError."""
        if self._rest:
            n = min(most, len(self._rest))
            self._rest = self._rest[n:]
            return n
        if self._scratch is None:
            self._scratch = mmap.mmap(-1, _SKIP_BYTES)
        flags = 0 if isinstance(self.socket, ssl.SSLSocket) else _SKIP_FLAGS
        n = self.socket.recv_into(self._scratch, min(most, _SKIP_BYTES), flags)
        if not n:
            raise EOFError
        return n

    def until(self, mark: bytes) -> bytes:
        """Read up to and including `mark`. EOFError."""
        while mark not in self._rest:
            piece = self.socket.recv(PIECE_BYTES)
            if not piece or len(self._rest) > _MAX_HEAD:
                raise EOFError
            self._rest += piece
        end = self._rest.index(mark) + len(mark)
        found, self._rest = self._rest[:end], self._rest[end:]
        return found

    def head(self) -> tuple[bytes, dict[str, str]]:
        """Read start line and headers; returns them as sent, and parsed."""
        raw = self.until(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")[1:]
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        return raw, {name.strip().lower(): value.strip() for name, value in pairs}

    def body(self, headers: dict[str, str]) -> Iterator[bytes]:
        """Yield the body's bytes as sent (a chunked body with its framing)."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                line = self.until(b"\r\n")
                yield line
                left = int(line.split(b";")[0], 16)
                if not left:
                    while True:  # trailers, then an empty line
                        line = self.until(b"\r\n")
                        yield line
                        if line == b"\r\n":
                            return
                left += 2
                while left:
                    piece = self.some(left)
                    left -= len(piece)
                    yield piece
        left = int(headers.get("content-length") or 0)
        while left:
            piece = self.some(left)
            left -= len(piece)
            yield piece
