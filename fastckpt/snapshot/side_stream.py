"""Copies from one device into host memory, on a stream of their own.

Written against torch's generic API, so that it is the same code on every accelerator; what is CUDA's alone is in cuda.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fastckpt.snapshot import cuda
from fastckpt.state.chunking import BUNDLE_BYTES

_POLL_S = 0.0005
# Generic events spin when they are waited for (torch 2.13), and hold a core that training needs: background threads ask and sleep.


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in a row."""
    return tensor if tensor.dtype is torch.uint8 and tensor.dim() == 1 else tensor.view(-1).view(torch.uint8)


def _flat(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The pieces with one dimension each. Most small tensors have one already; a view takes a microsecond."""
    return [piece if piece.dim() == 1 else piece.view(-1) for piece in pieces]


@torch.no_grad()
def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of contiguous tensors of one element type, in new memory on their device."""
    return bytes_of(torch.cat(_flat(pieces))) if len(pieces) > 1 else bytes_of(pieces[0]).clone()


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the current stream. Work that is given to it now is replayed later without running Python, so
    optimizers' hooks will not fire.
    """
    capturing = getattr(
        torch.accelerator.current_stream(device), "is_capturing", None
    )  # of every device since torch 2.13
    if capturing is not None:
        return bool(capturing())
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class SideStream:
    """One device's side stream. Made once per device and used again: streams come from a pool of 32 that repeats.

    `begin` and `hold_back` are for the thread that trains, whose current stream they mean; the others for any.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device=device)
        self._joint: torch.Tensor | None = None

    def begin(self) -> None:
        """Make what this stream is given from now on wait for what the caller's current stream was given so far."""
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))

    def copy(self, target: torch.Tensor, pieces: Sequence[torch.Tensor], *, pinned: bool) -> None:
        """Enqueue one copy of the pieces' bytes, joined, into host memory. Does not block if that is pinned.

        pieces: contiguous, of one element type. Several, of 1 MiB together at most, are joined on the device first: one transfer instead of
        hundreds. The pieces' memory is not used again before that has been read, even if everybody lets go of it.
        """
        with self.stream, torch.no_grad():
            for piece in pieces:
                piece.record_stream(self.stream)
            content = self._join(pieces) if len(pieces) > 1 else bytes_of(pieces[0])
            if content is not None:
                target.copy_(content, non_blocking=pinned)
                return
            at = 0
            for piece in pieces:
                content = bytes_of(piece)
                target[at : at + content.numel()].copy_(content, non_blocking=pinned)
                at += content.numel()

    def _join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Join the pieces in memory that is used again and again: what this stream does next with it comes after what it did before. None:
        the device has no room.
        """
        n_bytes = sum(piece.nbytes for piece in pieces)
        if self._joint is None or self._joint.numel() < n_bytes:
            try:
                self._joint = torch.empty(max(n_bytes, BUNDLE_BYTES), dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError:  # training has it all: slower, but no reason to fail
                return None
        content = self._joint[:n_bytes]
        torch.cat(_flat(pieces), out=content.view(pieces[0].dtype))
        return content

    def mark(self) -> torch.Event:
        """An event behind everything that this stream was given so far."""
        event = torch.Event(device=self.device)
        event.record(self.stream)
        return event

    def hold_back(self, event: torch.Event) -> None:
        """Make the caller's current stream wait for the event. The host waits only where a graph is being captured, which cannot wait for
        anything outside of it.
        """
        if is_capturing(self.device):
            wait_for(event)
            return
        torch.accelerator.current_stream(self.device).wait_event(event)


def wait_for(event: torch.Event) -> None:
    """Block this thread until the event has happened. Raises what the device reports."""
    with cuda.while_others_capture(event.device):
        while not event.query():
            time.sleep(_POLL_S)
