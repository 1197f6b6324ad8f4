"""boto3 with torch.save and torch.load: what most programs do, with settings that research found fastest."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import torch
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from benchmarks.storage_contenders.base import CONNECTIONS, Contender, Place, State

PART_BYTES = 16 << 20


def client(place: Place) -> Any:
    """Without checksums and signatures of bodies, which cost boto3 most of its time."""
    config = Config(
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=CONNECTIONS,
    )
    return boto3.client("s3", endpoint_url=place.endpoint, config=config)


class Boto3Torch(Contender):
    settings = {
        "save": "torch.save into a BytesIO; upload_fileobj, parts of 16 MiB, 8 at once, no checksums, bodies not signed",
        "restore": "get_object of ranges of 16 MiB, 8 at once, read into one BytesIO; torch.load of it",
    }

    def version(self) -> str:
        return str(boto3.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        self._place, self._state = place, state
        self._client = client(place)
        self._key = f"{place.prefix}/state.pt"
        self._threads = ThreadPoolExecutor(CONNECTIONS)

    def save(self) -> None:
        made = io.BytesIO()
        torch.save(self._state, made)
        made.seek(0)
        config = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONNECTIONS
        )
        self._client.upload_fileobj(made, self._place.bucket, self._key, Config=config)

    def restore(self) -> Any:
        n_bytes = self._client.head_object(Bucket=self._place.bucket, Key=self._key)["ContentLength"]
        made = io.BytesIO(bytes(n_bytes))
        room = made.getbuffer()

        def fetch(start: int) -> None:
            end = min(start + PART_BYTES, n_bytes)
            answer = self._client.get_object(Bucket=self._place.bucket, Key=self._key, Range=f"bytes={start}-{end - 1}")
            at = start
            while at < end:
                at += answer["Body"].readinto(room[at:end])

        list(self._threads.map(fetch, range(0, n_bytes, PART_BYTES)))
        room.release()
        return torch.load(made)
