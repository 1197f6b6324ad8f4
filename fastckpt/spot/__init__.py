"""Finds out when the machine is about to go: notices from the metadata service, a signal or a file (docs/spot.md). Imports no torch."""

from fastckpt.events import NoticeReceived, NoticeSourceBlind
from fastckpt.spot.notice import Notice
from fastckpt.spot.select import open_sources
from fastckpt.spot.sources import Ec2Source, FileSource, NoticeSource, SignalSource
from fastckpt.spot.watcher import Watcher
from fastckpt.spot.worker_errors import WorkerErrors

__all__ = [
    "Ec2Source",
    "FileSource",
    "Notice",
    "NoticeReceived",
    "NoticeSource",
    "NoticeSourceBlind",
    "SignalSource",
    "Watcher",
    "WorkerErrors",
    "open_sources",
]
