"""boto3 with torch.save and torch.load: what most programs do, with settings that research found fastest."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import torch
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


class _Part:
    """Bytes that botocore reads without a copy: a file whose pieces are views. Shorter pieces cost a hand-over of the lock each."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def __len__(self) -> int:
        return self._view.nbytes

    def read(self, _: int = -1) -> memoryview:
        piece = self._view[self._at : self._at + (8 << 20)]
        self._at += piece.nbytes
        return piece

    def seek(self, at: int, whence: int = 0) -> int:
        self._at = (0, self._at, len(self))[whence] + at
        return self._at

    def tell(self) -> int:
        return self._at


class Boto3Torch(Contender):
    settings = {
        "save": "torch.save into a BytesIO; upload_part of parts of 16 MiB, 8 at once, from views of it, no checksums, bodies not signed",
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
        where = {"Bucket": self._place.bucket, "Key": self._key}
        begun = self._client.create_multipart_upload(**where)["UploadId"]
        view = made.getbuffer()

        def send(number: int) -> dict[str, Any]:
            part = _Part(view[number * PART_BYTES : (number + 1) * PART_BYTES])
            done = self._client.upload_part(**where, UploadId=begun, PartNumber=number + 1, Body=part)
            return {"ETag": done["ETag"], "PartNumber": number + 1}

        parts = list(self._threads.map(send, range(-(-view.nbytes // PART_BYTES))))
        self._client.complete_multipart_upload(**where, UploadId=begun, MultipartUpload={"Parts": parts})

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
