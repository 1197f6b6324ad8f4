"""The kernels in NumPy: they define what the other implementations must compute (docs/format.md, sections 1, 4.3 and 4.4)."""

from fastckpt.kernels.reference.crc import crc64nvme, crc64nvme_combine, crc_tables
from fastckpt.kernels.reference.estimate import Estimate, sample
from fastckpt.kernels.reference.memory import (
    ROW_WORDS,
    WHOLE_BELOW,
    equal,
    fingerprint,
    gather,
    lines,
    lines_bytes,
    rows,
)
from fastckpt.kernels.reference.streams import (
    STRIPE_LANES,
    cast,
    cast_equal,
    check_arguments,
    difference,
    is_constant,
    lanes_of,
    merge,
    rotated,
    split,
    stream_bytes,
)

__all__ = [
    "ROW_WORDS",
    "STRIPE_LANES",
    "WHOLE_BELOW",
    "Estimate",
    "cast",
    "cast_equal",
    "check_arguments",
    "crc64nvme",
    "crc64nvme_combine",
    "crc_tables",
    "difference",
    "equal",
    "fingerprint",
    "gather",
    "is_constant",
    "lanes_of",
    "lines",
    "lines_bytes",
    "merge",
    "rotated",
    "rows",
    "sample",
    "split",
    "stream_bytes",
]
