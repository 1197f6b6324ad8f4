"""Run:ai's model streamer, which only reads: safetensors files in S3."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from benchmarks.storage_contenders.base import Contender, Place, State, flat
from benchmarks.storage_contenders.boto3_torch import client


class Runai(Contender):
    tensors_only = True
    settings = {
        "save": "none of its own: safetensors bytes are put by boto3, and not measured",
        "restore": "SafetensorsStreamer.stream_file, each tensor cloned, as its buffer is used again; defaults (8 at once)",
        "one tensor": "tensor_names=[name]",
    }

    def version(self) -> str:
        return importlib.metadata.version("runai-model-streamer")

    def prepare(self, place: Place, state: State | None) -> None:
        os.environ.update(
            AWS_ENDPOINT_URL=place.endpoint,
            RUNAI_STREAMER_S3_ENDPOINT=place.endpoint,
            RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0",
        )
        self._place, self._state = place, state
        self._url = f"{place.root}/state.safetensors"

    def save(self) -> None:
        import io

        from safetensors.torch import save

        assert self._state is not None
        key = f"{self._place.prefix}/state.safetensors"
        client(self._place).upload_fileobj(io.BytesIO(save(flat(self._state))), self._place.bucket, key)

    def restore(self) -> Any:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_file(self._url)
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}

    def one(self, name: str) -> Any:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_file(self._url, tensor_names=[name])
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}[name]
