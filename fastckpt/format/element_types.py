"""The element types that the directory may name, and their sizes (docs/format.md, section 5)."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np

NUMPY_PREFIX = "numpy:"


class ElementType(NamedTuple):
    """Facts about a dtype that chunking and codec need."""

    name: str
    n_bytes: int
    float_lane_bytes: int
    """Bytes of each floating-point number in it (half an element for complex types); 0: ROT is not worth trying."""

    @property
    def const_lane_bytes(self) -> int:
        """Widest lane that divides an element; a constant chunk repeats such a lane."""
        return self.n_bytes if self.n_bytes in (1, 2, 4, 8) else 8 if self.n_bytes % 8 == 0 else 1


_FLOATS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_COMPLEX = {"complex128": 16, "complex64": 8, "complex32": 4}
_PLAIN = {
    **{"bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1},
    **{"float4_e2m1fn_x2": 1, "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1},
    **{"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1},
}
_BY_NAME = {
    **{name: ElementType(name, size, size) for name, size in _FLOATS.items()},
    **{name: ElementType(name, size, size // 2) for name, size in _COMPLEX.items()},
    **{name: ElementType(name, size, 0) for name, size in _PLAIN.items()},
}
_NUMPY = re.compile(r"([<>|=])([biufcmMSUV])(\d{1,9})(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")
_NUMPY_FLOAT_LANES = {"f": {2: 2, 4: 4, 8: 8}, "c": {8: 4, 16: 8}}


@functools.lru_cache(maxsize=256)
def element_type(name: str) -> ElementType | None:
    """The element type of that name; None if this version of the format does not know it."""
    if not name.startswith(NUMPY_PREFIX):
        return _BY_NAME.get(name)
    match = _NUMPY.fullmatch(name.removeprefix(NUMPY_PREFIX))
    if match is None:
        return None
    try:
        n_bytes = np.dtype(match.group()).itemsize
    except (TypeError, ValueError, OverflowError):
        return None
    if n_bytes == 0:
        return None
    order, kind = match.group(1), match.group(2)
    return ElementType(name, n_bytes, 0 if order == ">" else _NUMPY_FLOAT_LANES.get(kind, {}).get(n_bytes, 0))
