"""Types that several rooms write in their signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

U8: TypeAlias = npt.NDArray[np.uint8]
"""Bytes as an array; one-dimensional, unless something else is said."""

U64: TypeAlias = npt.NDArray[np.uint64]

Progress: TypeAlias = Callable[[int, int], None]
"""Called now and then with the amount done and the total, both in bytes."""
