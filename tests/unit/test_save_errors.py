"""What a save raises where the machine fails: typed, with the cause, and what to do."""

from __future__ import annotations

import errno

import pytest

from fastckpt.errors import OutOfHostMemoryError, SaveError, TornSnapshotError, as_save_error
from fastckpt.host import pages


@pytest.mark.parametrize(
    "error", [MemoryError("5 bytes"), OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()]
)
def test_out_of_memory_is_a_save_error_and_a_memory_error(error: BaseException) -> None:
    found = as_save_error(error, 7)
    assert isinstance(found, OutOfHostMemoryError)
    assert isinstance(found, SaveError)
    assert isinstance(found, MemoryError)
    assert found.__cause__ is error
    assert "step 7" in str(found)
    assert str(error) in str(found)
    assert "host_budget_bytes" in str(found)


def test_what_torch_raises_is_a_save_error_in_its_words() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")
    found = as_save_error(error, 7)
    assert type(found) is SaveError
    assert found.__cause__ is error
    assert "illegal memory access" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error", [TornSnapshotError("torn"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), TypeError("x")]
)
def test_everything_else_is_as_it_was(error: BaseException) -> None:
    assert as_save_error(error, 7) is error


def test_pages_that_cannot_be_mapped_are_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes of host memory"):
        pages.fresh_pages(1 << 60)
