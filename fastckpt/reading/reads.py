"""How much a load may have under way: a pure consequence of the options."""

from __future__ import annotations

from typing import NamedTuple

from fastckpt.options import DECODER_BYTES, Options
from fastckpt.reading.ranges import Limits

_READER_BYTES = 2 << 20  # planes of a stripe: whoever has read a range decodes it
_MOST_AT_ONCE = 64
_DEVICE_WINDOW_BYTES = 256 << 20  # enough chunks ahead to keep 16 threads busy while a storage is copied to a device


class Reads(NamedTuple):
    """See the module. The defaults are those of `Options()` on a machine with few processors."""

    at_once: int = 16
    """Reads of a store under way."""
    buffers_bytes: int = 128 << 20
    """Most memory of ranges that have been read and not decoded yet."""
    window_bytes: int = 128 << 20
    """Of storages that go on to a device, from which size on no more are read ahead."""
    parked_bytes: int = 0
    """Most memory of ranges' parts that wait for the others of their chain."""
    scratch_bytes: int = 0
    """Most memory of rows that have no place in the loaded state, while chains are decoded; a single chain may take more."""

    @classmethod
    def of(cls, options: Options) -> Reads:
        """What the options allow. The memory of a load beyond the state stays below `load_extra_bytes`."""
        at_once = min(_MOST_AT_ONCE, 2 * options.connections)
        left = options.load_extra_bytes - options.load_threads * DECODER_BYTES
        at_once = max(1, min(at_once, left // (2 * _READER_BYTES)))
        left -= at_once * _READER_BYTES
        buffers_bytes = min(at_once * Limits().range_bytes, left // 2)
        return cls(at_once, buffers_bytes, min(_DEVICE_WINDOW_BYTES, left - buffers_bytes))

    def with_chains(self, *, has_window: bool) -> Reads:
        """As much memory, of which chains have a part. has_window: whether storages go on to a device; if not, bytes may be parked in its
        memory: with 32 MiB, a restore of 105 MB from a store read up to 16 % of its bytes twice, with 64 none.
        """
        parked_bytes = self.buffers_bytes // 4
        scratch_bytes = self.window_bytes // 4
        window_bytes = self.window_bytes - scratch_bytes
        return self._replace(
            buffers_bytes=self.buffers_bytes - parked_bytes,
            window_bytes=window_bytes if has_window else 0,
            parked_bytes=parked_bytes if has_window else parked_bytes + window_bytes,
            scratch_bytes=scratch_bytes,
        )


PLAIN_READS = Reads()
