"""Amazon's s3torchconnector: torch.save into its writer, and its storage for torch.distributed.checkpoint."""

from __future__ import annotations

import os
from typing import Any

import s3torchconnector
import torch
from s3torchconnector import S3Checkpoint, S3ClientConfig

from benchmarks.storage_contenders.base import Contender, Place, State

REGION = "us-east-1"


class S3TorchConnector(Contender):
    settings = {"save": "torch.save into S3Checkpoint.writer", "restore": "torch.load of S3Checkpoint.reader"}

    def version(self) -> str:
        return str(s3torchconnector.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        os.environ["AWS_ENDPOINT_URL"] = place.endpoint
        self._place, self._state = place, state
        self._config = S3ClientConfig(force_path_style=True)
        self._checkpoint = S3Checkpoint(region=REGION, endpoint=place.endpoint, s3client_config=self._config)

    def save(self) -> None:
        with self._checkpoint.writer(f"{self._place.root}/state.pt") as writer:
            torch.save(self._state, writer)

    def restore(self) -> Any:
        with self._checkpoint.reader(f"{self._place.root}/state.pt") as reader:
            return torch.load(reader)


class S3TorchConnectorDcp(S3TorchConnector):
    settings = {"save": "dcp.save(no_dist=True) with S3StorageWriter, 4 threads"}

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp
        from s3torchconnector.dcp import S3StorageWriter

        writer = S3StorageWriter(REGION, f"{self._place.root}/dcp/", s3client_config=self._config, thread_count=4)
        dcp.save(self._state, storage_writer=writer, no_dist=True)
