"""obstore moving the stored bytes of a checkpoint of fastckpt, and nothing else: what a save to this store cannot do without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import obstore
from obstore.store import S3Store

from benchmarks.storage_contenders.base import CONNECTIONS, Contender, Place, State, keys


class ObstorePuts(Contender):
    signed = False
    settings = {"save": "one put of each of fastckpt's objects, 8 at once, from memory, bodies not signed"}

    def version(self) -> str:
        return str(obstore.__version__)

    def prepare(self, place: Place, state: State | None) -> None:
        self._place = place
        self._store = S3Store(
            place.bucket,
            endpoint=place.endpoint,
            region="us-east-1",
            access_key_id=keys()["access"],
            secret_access_key=keys()["secret"],
            unsigned_payload=not self.signed,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "allow_invalid_certificates": True, "timeout": "300s"},
        )
        source = place.source.removeprefix(f"s3://{place.bucket}/")
        found = [entry["path"] for page in obstore.list(self._store, source + "/") for entry in page]
        self._bodies = [memoryview(obstore.get(self._store, path).bytes()) for path in found]
        self.n_bytes = sum(body.nbytes for body in self._bodies)
        self._threads = ThreadPoolExecutor(CONNECTIONS)
        list(self._threads.map(lambda n: self._put(f"warm-{n}", memoryview(b"x")), range(CONNECTIONS)))

    def _put(self, name: str, body: memoryview) -> None:
        obstore.put(self._store, f"{self._place.prefix}/{name}", body, use_multipart=False)

    def save(self) -> None:
        list(self._threads.map(self._put, map(str, range(len(self._bodies))), self._bodies))


class ObstorePutsSigned(ObstorePuts):
    """As this project does over plain http, where nothing else protects a body."""

    signed = True
    settings = {"save": f"{ObstorePuts.settings['save'].removesuffix('not signed')}signed: its default"}
