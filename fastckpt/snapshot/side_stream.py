"""Copies from one device into host memory, on a stream of their own.

Uses torch's generic API, so that the code is the same on every accelerator; CUDA's own calls are in cuda.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from fastckpt.snapshot import cuda
from fastckpt.state.chunking import BUNDLE_BYTES

_POLL_S = 0.0005
# Waiting for a generic event spins (torch 2.13) and occupies a core that training needs: background threads poll and sleep instead.


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """View the bytes of a contiguous tensor as one row."""
    return tensor if tensor.dtype is torch.uint8 and tensor.dim() == 1 else tensor.view(-1).view(torch.uint8)


def _flat(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The pieces as one-dimensional tensors. Most small tensors have one dimension already; a view takes a microsecond."""
    return [piece if piece.dim() == 1 else piece.view(-1) for piece in pieces]


@torch.no_grad()
def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of contiguous tensors of one element type, in new memory on their device."""
    return bytes_of(torch.cat(_flat(pieces))) if len(pieces) > 1 else bytes_of(pieces[0]).clone()


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the current stream. Work enqueued now is replayed later without running Python, so optimizers'
    hooks will not fire.
    """
    capturing = getattr(
        torch.accelerator.current_stream(device), "is_capturing", None
    )  # of every device since torch 2.13
    if capturing is not None:
        return bool(capturing())
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class SideStream:
    """One device's side stream. Made once per device and used again: streams come from a pool of 32 that repeats.

    `begin` and `hold_back` are for the training thread, because they use its current stream; any thread may call the others.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device=device)
        self._joint: torch.Tensor | None = None

    def begin(self) -> None:
        """Make this stream's later work wait for the work that the caller's current stream has been given so far."""
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))

    def copy(self, target: torch.Tensor, pieces: Sequence[torch.Tensor], *, pinned: bool) -> None:
        """Enqueue one copy of the pieces' bytes, joined, into host memory. Does not block if that is pinned.

        pieces: contiguous, of one element type. Several pieces of together at most 1 MiB are joined on the device first: one transfer
        instead of hundreds. The pieces' memory is not reused before it has been read, even if all references to it are dropped.
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
        """Join the pieces in a reused buffer. That is safe, because the work of one stream runs in order. None: the device has no
        memory.
        """
        n_bytes = sum(piece.nbytes for piece in pieces)
        if self._joint is None or self._joint.numel() < n_bytes:
            try:
                self._joint = torch.empty(max(n_bytes, BUNDLE_BYTES), dtype=torch.uint8, device=self.device)
            except (
                torch.OutOfMemoryError
            ):  # training uses all of it: copying piece by piece is slower, but no reason to fail
                return None
        content = self._joint[:n_bytes]
        torch.cat(_flat(pieces), out=content.view(pieces[0].dtype))
        return content

    def mark(self) -> torch.Event:
        """Record an event after all work that this stream was given so far."""
        event = torch.Event(device=self.device)
        event.record(self.stream)
        return event

    def hold_back(self, event: torch.Event) -> None:
        """Make the caller's current stream wait for the event. The host waits only while a graph is being captured, because a graph cannot
        wait for events outside of it.
        """
        if is_capturing(self.device):
            wait_for(event)
            return
        torch.accelerator.current_stream(self.device).wait_event(event)


def wait_for(event: torch.Event, is_over: Callable[[], bool] = lambda: False) -> bool:
    """Block this thread until the event has happened. False: `is_over` has become true before that. Raises the device's error."""
    with cuda.while_others_capture(event.device):
        while not event.query():
            if is_over():
                return False
            time.sleep(_POLL_S)
    return True
