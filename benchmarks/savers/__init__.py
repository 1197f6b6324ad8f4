"""Ways to save a running training loop, by name. Each module is imported only in the process that measures it."""

from __future__ import annotations

from importlib import import_module

from benchmarks.savers.base import Saver

WHERE = {
    "none": "base:NoSaves",
    "fastckpt": "fastckpt_run:Fastckpt",
    "fastckpt-full": "fastckpt_run:FastckptFull",
    "fastckpt-raw": "fastckpt_run:FastckptRaw",
    "moonclip": "moonclip_run:Moonclip",
    "moonclip-lean": "moonclip_run:MoonclipLean",
    "dcp": "dcp_run:Dcp",
    "dcp-staging": "dcp_run:DcpAsyncStaging",
}
OURS = ("fastckpt", "fastckpt-full", "fastckpt-raw")


def make(name: str, budget_bytes: int = 0) -> Saver:
    """budget_bytes: host memory that fastckpt may take; 0: its default."""
    module, cls = WHERE[name].split(":")
    found = getattr(import_module(f"benchmarks.savers.{module}"), cls)
    saver: Saver = found(budget_bytes) if name in OURS else found()
    saver.name = name
    return saver
