"""tensorizer, to and from S3 or a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorizer
from tensorizer import TensorDeserializer, TensorSerializer, stream_io

from benchmarks.storage_contenders.base import Contender, Place, State, flat, keys


class Tensorizer(Contender):
    tensors_only = True
    settings = {
        "save": "TensorSerializer(open_stream(…)).write_state_dict; a file: then fsync",
        "restore": "TensorDeserializer(device='cpu'), verify_hash=False and num_readers chosen by itself: its defaults",
        "one tensor": "lazy_load=True",
    }

    def version(self) -> str:
        return str(tensorizer.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        self._url = f"{place.root}/state.tensors"
        self._flat = None if state is None else flat(state)
        self._more: dict[str, Any] = {}
        if place.endpoint:
            self._more = {
                "s3_access_key_id": keys()["access"],
                "s3_secret_access_key": keys()["secret"],
                "s3_endpoint": place.endpoint.partition("://")[2],
                "force_http": place.endpoint.startswith("http:"),
            }
        else:
            Path(place.root).mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        serializer = TensorSerializer(stream_io.open_stream(self._url, "wb+", **self._more))
        serializer.write_state_dict(self._flat)
        serializer.close()
        if not self._more:
            os.sync()

    def restore(self) -> Any:
        with TensorDeserializer(stream_io.open_stream(self._url, "rb", **self._more), device="cpu") as found:
            return {str(name): tensor.data for name, tensor in found.items()}

    def one(self, name: str) -> Any:
        stream = stream_io.open_stream(self._url, "rb", **self._more)
        with TensorDeserializer(stream, device="cpu", lazy_load=True) as found:
            return found[name].data
