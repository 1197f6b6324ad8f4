"""Copies from one device into host memory, on a stream of their own.

Written against torch's generic API, so that it is the same code on every accelerator; what is CUDA's alone is in cuda.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fastckpt.snapshot import cuda

_POLL_S = 0.0005
# Generic events spin when they are waited for (torch 2.13), and hold a core that training needs: background threads ask and sleep.


def is_capturing(device: torch.device) -> bool:
    """Whether what the current stream is given becomes part of a graph, to be replayed without any Python, and so without hooks."""
    capturing = getattr(torch.accelerator.current_stream(device), "is_capturing", None)  # since torch 2.10
    if capturing is not None:
        return bool(capturing())
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Lane:
    """One device's side stream. Made once per device and used again: streams come from a pool of 32 that repeats.

    `begin` and `hold_back` are for the thread that trains, whose current stream they mean; the others for any.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device=device)

    def begin(self) -> None:
        """What the caller's current stream has been given so far comes before what this lane is given from now on."""
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))

    def copy(self, target: torch.Tensor, pieces: Sequence[torch.Tensor], *, pinned: bool) -> None:
        """Enqueue one copy of the pieces' bytes, joined, into host memory. Does not block if that is pinned.

        Several pieces are joined on the device first: one transfer of a megabyte instead of hundreds of some kilobytes. The pieces' memory
        is not reused before that has been read, even if everybody lets go of it.
        """
        with self.stream:
            for piece in pieces:
                piece.record_stream(self.stream)
            if len(pieces) == 1:
                target.copy_(pieces[0], non_blocking=pinned)
                return
            try:
                joined = torch.cat(list(pieces))
            except torch.OutOfMemoryError:  # training has it all: slower, but no reason to fail
                at = 0
                for piece in pieces:
                    target[at : at + piece.numel()].copy_(piece, non_blocking=pinned)
                    at += piece.numel()
                return
            target.copy_(joined, non_blocking=pinned)

    def mark(self) -> torch.Event:
        """An event behind everything that this lane was given so far."""
        event = torch.Event(device=self.device)
        event.record(self.stream)
        return event

    def hold_back(self, event: torch.Event) -> None:
        """The caller's current stream goes on only after the event; the host does not wait, except where a graph is being captured: that
        cannot wait for anything outside of it.
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
