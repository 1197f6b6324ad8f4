"""Bytes to be put, with a checksum that is known already."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Body(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array to give to `Store.put`. A store that sends a CRC-64/NVME takes it from here and does not read the bytes for it; to any other
    store this is an array. A part of it has no checksum.
    """

    crc64nvme: int | None = None

    @classmethod
    def of(cls, array: npt.NDArray[np.uint8], crc64nvme: int) -> Body:
        """The same memory. crc64nvme: of all its bytes."""
        body = array.view(cls)
        body.crc64nvme = crc64nvme
        return body


def known_crc64nvme(data: Any) -> int | None:
    """The checksum that came with the data; None: it has to be computed."""
    return data.crc64nvme if isinstance(data, Body) else None
