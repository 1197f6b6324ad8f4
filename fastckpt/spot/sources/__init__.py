"""Sources of notices, one module for each origin. A new cloud needs one more module here, and a word in `select.py`."""

from fastckpt.spot.sources.base import NoticeSource
from fastckpt.spot.sources.ec2 import Ec2Source
from fastckpt.spot.sources.file import FileSource
from fastckpt.spot.sources.signals import SLURM_WARNING_S, SignalSource, SlurmSource

__all__ = ["SLURM_WARNING_S", "Ec2Source", "FileSource", "NoticeSource", "SignalSource", "SlurmSource"]
