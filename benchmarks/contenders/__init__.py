"""The contenders by name. Each module is imported only in the process that measures it: a rival that is not installed
is a row that says so, and nobody's import shows in another one's memory."""

from __future__ import annotations

from importlib import import_module

from benchmarks.contenders.base import Contender

WHERE = {
    "torch": "torch_save:TorchSave",
    "torch-mmap": "torch_save:TorchSaveMmap",
    "safetensors": "safetensors_file:Safetensors",
    "dcp": "dcp:Dcp",
    "dcp-async": "dcp:DcpAsync",
    "moonclip": "moonclip_store:Moonclip",
    "moonclip-async": "moonclip_store:MoonclipAsync",
    "moonclip-async-1": "moonclip_store:MoonclipAsyncLevel1",
    "fastckpt": "fastckpt_file:Fastckpt",
    "fastckpt-async": "fastckpt_file:FastckptAsync",
    "gpu-direct": "gpu_direct:GpuDirect",
}


def make(name: str) -> Contender:
    module, cls = WHERE[name].split(":")
    contender: Contender = getattr(import_module(f"benchmarks.contenders.{module}"), cls)()
    contender.name = name
    return contender
