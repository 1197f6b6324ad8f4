"""The short name of `fastckpt.integrations.dcp`."""

from fastckpt.integrations.dcp import FastckptReader, FastckptSavePlanner, FastckptWriter

__all__ = ["FastckptReader", "FastckptSavePlanner", "FastckptWriter"]
