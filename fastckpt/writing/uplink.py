"""The way to one store, as the saves of one process find it: what is kept from save to save."""

from __future__ import annotations

from fastckpt import codec
from fastckpt.options import Options
from fastckpt.writing.link import Link
from fastckpt.writing.pack_buffers import PackBuffers


class Uplink:
    """Decisions about packs, connections and effort, made from what earlier saves and this one have measured.

    Several saves of one process may use it, one after the other. `effort` may be read at any time; the other methods are called under the
    lock of the save.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.link = Link(options.connections, options.max_connections)
        self.buffers = PackBuffers()

    @property
    def effort(self) -> codec.Effort:
        """How much time the next chunk may take."""
        return codec.Effort.NORMAL if self._options.compress else codec.Effort.NONE

    @property
    def packs_at_once(self) -> int:
        """How many packs may exist now: one that is sent on each connection, one that each encoder fills, and one that waits."""
        return self.link.connections + self._options.encoders + 1

    def begin(self, raw_bytes: int) -> None:
        """A save of raw_bytes begins."""
        room, encoders = self._options.pack_buffer_bytes, self._options.encoders
        n_bytes = self.link.pack_bytes(raw_bytes, room // (self.link.upcoming + encoders))
        self.buffers.begin(n_bytes, max(self._options.connections + encoders, room // n_bytes))

    def pack_bytes(self, left_bytes: int, most_bytes: int) -> int:
        """The length of the next pack: see `Link.pack_bytes`."""
        return self.link.pack_bytes(left_bytes, most_bytes)

    def put_finished(self, now_s: float, n_bytes: int, seconds: float, *, waiting: int, sending: int) -> int:
        """A put of a pack has succeeded. Returns how many connections more are to be used.

        waiting: packs that no connection has begun to send. sending: those under way, this one included.
        """
        before = self.link.connections
        self.link.put_finished(now_s, n_bytes, seconds, busy=waiting > 0 or sending >= before)
        return max(0, self.link.connections - before)
