"""The way to one store, as the saves of one process find it: what is kept from save to save."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.format.tensor_names import Name
from fastckpt.options import Options
from fastckpt.writing.effort import Efforts, fixed_effort, least_effort
from fastckpt.writing.link import Link
from fastckpt.writing.pack_buffers import PackBuffers
from fastckpt.writing.rate_limit import RateLimit


class Uplink:
    """Decides on packs, connections and effort, by what earlier saves and this one have measured; keeps the memory of packs.

    Several saves of one process may use it, one after the other. `efforts.level` and `limit` are for any thread; all else is called under
    the lock of the save.
    """

    def __init__(self, options: Options, in_a_hurry: Callable[[], bool] = lambda: False) -> None:
        """in_a_hurry: while it says True, `max_upload_bytes_per_s` does not hold."""
        self._options = options
        self.limit = RateLimit(options.max_upload_bytes_per_s, in_a_hurry)
        self.link = Link(options.connections, options.max_connections)
        self.efforts = Efforts(options.encoders, fixed_effort(options), least_effort(options))
        self.buffers = PackBuffers()
        self.masters: dict[Name, Name] = {}
        """First names of bfloat16 copies → those of their float32 masters, as saves have found them."""

    @property
    def packs_at_once(self) -> int:
        """How many packs may exist now: one that is sent on each connection, one that each encoder fills, and one that waits."""
        return self.link.connections + self._options.encoders + 1

    def begin(self, raw_bytes: int) -> None:
        """A save of raw_bytes begins."""
        room, encoders = self._options.pack_buffer_bytes, self._options.encoders
        n_bytes = self.link.pack_bytes(raw_bytes, room // (self.link.upcoming + encoders))
        self.buffers.begin(n_bytes, max(self._options.connections + encoders, room // n_bytes))
        self.efforts.begin()

    def pack_bytes(self, left_bytes: int, most_bytes: int) -> int:
        """The length of the next pack: see `Link.pack_bytes`."""
        return self.link.pack_bytes(left_bytes, most_bytes)

    def put_finished(
        self, now_s: float, n_bytes: int, seconds: float, *, waiting: int, sending: int, more: bool
    ) -> int:
        """A put of a pack has succeeded. Returns how many connections more are to be used.

        waiting: packs that no connection has begun to send. sending: those under way, this one included. more: chunks are still to be
        encoded.
        """
        before = self.link.connections
        self.link.put_finished(now_s, n_bytes, seconds, busy=waiting > 0 or sending >= before)
        if more:
            self.efforts.put_finished(now_s, n_bytes, waiting, before)
        return max(0, self.link.connections - before)
