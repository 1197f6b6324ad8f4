"""The contenders of benchmarks/storage.py by name. Each module is imported only in the process that measures it."""

from __future__ import annotations

from importlib import import_module

from benchmarks.storage_contenders.base import Contender

WHERE = {
    "Checkpointer": "ours:OwnCheckpointer",
    "fastckpt.save/load": "ours:OwnFile",
    "obstore PUT": "obstore_puts:ObstorePuts",
    "obstore PUT, signed": "obstore_puts:ObstorePutsSigned",
    "boto3 + torch.save": "boto3_torch:Boto3Torch",
    "tensorizer": "tensorizer_s3:Tensorizer",
    "runai": "runai_s3:Runai",
    "moonclip": "moonclip_s3:Moonclip",
    "moonclip raw": "moonclip_s3:MoonclipRaw",
    "s3torchconnector": "s3_torch_connector:S3TorchConnector",
    "s3torchconnector dcp": "s3_torch_connector:S3TorchConnectorDcp",
    "torch.save": "local:TorchFile",
    "safetensors mapped": "local:SafetensorsMapped",
    "torch_checkpointing": "local:TorchCheckpointing",
}
OURS = ("Checkpointer", "fastckpt.save/load")
"""Measured in this project's own environment, the others in one of theirs."""

EVERYWHERE = ("torch.save", "safetensors mapped")
"""What both environments can measure."""


def make(name: str) -> Contender:
    """The contender of that name. Raises ImportError if its packages are not there."""
    module, cls = WHERE[name].split(":")
    contender: Contender = getattr(import_module(f"benchmarks.storage_contenders.{module}"), cls)()
    contender.name = name
    return contender
