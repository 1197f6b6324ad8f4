"""Stores on Google Cloud Storage and Azure Blob, by obstore, a client in Rust, which signs and moves the bytes (docs/stores.md).

One method is one request, tried once: obstore's own retries are switched off, because only `store/wrap.py` knows what may be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from fastckpt.errors import ObjectChangedError, ObjectExistsError, ObjectNotFoundError, StoreError
from fastckpt.store.base import ObjectInfo, Store, check_key, check_name, check_prefix
from fastckpt.store.blob_client import Place, client_of, interruptible
from fastckpt.store.blob_errors import BlobRangeError, translate

T = TypeVar("T")

_SHOWN = {"gs": "gs", "gcs": "gs", "az": "az", "azure": "az"}
_MOST_PUT_BYTES = {"gs": 5 << 40, "az": 5000 << 20}
_EXPERIMENTAL = {
    "gs": "gs:// is experimental: that creates are atomic there has been shown on no server yet",
}


class BlobStore(Store):
    """Objects under one prefix of a bucket or container. Made by `open_blobs`. Nothing is sent before the first call."""

    def __init__(self, place: Place, prefix: str, *, any_names: bool, many_writers: bool) -> None:
        self._place, self._prefix = place, prefix
        self.url = f"{place.url}/{prefix}" if prefix else place.url
        self.most_put_bytes = _MOST_PUT_BYTES[place.scheme]
        self.one_writer = None if many_writers else _EXPERIMENTAL.get(place.scheme)
        self._check: Callable[[str], str] = check_name if any_names else check_key
        self._closed = False

    def __repr__(self) -> str:
        return f"BlobStore({self.url!r})"

    def put(self, key: str, data: Any) -> None:
        self._put("put", key, data, "overwrite")

    def put_if_absent(self, key: str, data: Any) -> None:
        self._put("put_if_absent", key, data, "create")

    def get_version(self, key: str) -> tuple[bytes, str]:
        """As the contract says; the version is the ETag and Google's generation, with a line end between them."""

        def read(client: Any, name: str) -> tuple[bytes, Mapping[str, Any]]:
            import obstore

            found = obstore.get(client, name)
            return bytes(found.bytes()), found.meta

        data, meta = self._ask("get", key, 0, read)
        return data, f"{meta.get('e_tag') or ''}\n{meta.get('version') or ''}"

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        e_tag, _, generation = version.partition("\n")
        mode = {name: text for name, text in (("e_tag", e_tag), ("version", generation)) if text}
        try:
            self._put("replace", key, data, mode)
        except ObjectExistsError:
            raise ObjectChangedError(f"replace {self.url}/{key}: it is not the version that was read") from None

    def _put(self, doing: str, key: str, data: Any, mode: Any) -> None:
        view = memoryview(data)
        body = view.cast("B") if view.nbytes else b""  # an empty view cannot be cast
        most = self.most_put_bytes
        if most is not None and view.nbytes > most:
            raise StoreError(f"{doing} {self.url}/{key}: {view.nbytes} bytes; one PUT carries at most {most}")

        def write(client: Any, name: str) -> None:
            import obstore

            obstore.put(client, name, body, mode=mode, use_multipart=False)

        self._ask(doing, key, view.nbytes, write)

    def get(self, key: str) -> bytes:
        return self.get_version(key)[0]

    def get_into(self, key: str, offset: int, out: Any) -> None:
        """As the contract says. The bytes are copied once: obstore has no way to give it the buffer."""
        view = memoryview(out)
        if not view.nbytes:
            self.head(key)
            return
        view = view.cast("B")
        end = offset + view.nbytes

        def read(client: Any, name: str) -> Any:
            import obstore

            return obstore.get_range(client, name, start=offset, end=end)

        try:
            found = memoryview(self._ask("get", key, view.nbytes, read))
        except BlobRangeError as error:
            raise EOFError(f"{self.url}/{key} ends at or before byte {offset}: expected {end} or more") from error
        view[: found.nbytes] = found
        if found.nbytes < view.nbytes:
            raise EOFError(f"{self.url}/{key} has {offset + found.nbytes} bytes: expected {end} or more")

    def head(self, key: str) -> ObjectInfo:
        def look(client: Any, name: str) -> Any:
            import obstore

            return obstore.head(client, name)

        return _info(key, self._ask("head", key, 0, look))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the contract says. Objects whose keys are not valid (`check_key`) are left out, because no method would accept them."""
        check_prefix(prefix)
        base = f"{self._prefix}/" if self._prefix else ""

        def pages(client: Any, name: str) -> Iterator[Any]:
            import obstore

            return iter(obstore.list(client, prefix=name or None))

        found = self._ask("list", "", 0, pages, name=base + prefix)
        last = ""
        while page := self._ask("list", "", 0, lambda client, name: next(found, None), name=base + prefix):
            for entry in page:
                key = str(entry["path"]).removeprefix(base)
                if not _is_key(key):
                    continue
                if key <= last:
                    raise StoreError(
                        f"list {self.url}/{prefix}: {key!r} comes after {last!r}; stores that do not sort are not supported"
                    )
                last = key
                yield _info(key, entry)

    def delete(self, key: str) -> None:
        def remove(client: Any, name: str) -> None:
            import obstore

            obstore.delete(client, name)

        try:
            self._ask("delete", key, 0, remove)
        except ObjectNotFoundError:
            return

    def close(self) -> None:
        """Send nothing more. The connections stay, for other stores of this process."""
        self._closed = True

    def _ask(self, doing: str, key: str, n_bytes: int, ask: Callable[[Any, str], T], *, name: str | None = None) -> T:
        """Run one request of obstore with the name of the object. name: of something else than the object `key`. StoreError."""
        if name is None:
            self._check(key)
            name = f"{self._prefix}/{key}" if self._prefix else key
        if self._closed:
            raise StoreError(f"{self.url} is closed")
        client = client_of(self._place, n_bytes)
        problem: StoreError | None = None
        try:
            return interruptible(lambda: ask(client, name))
        except Exception as error:  # its text may hold a secret, so it is not kept as the cause
            problem = translate(error, doing, f"{self.url}/{key}" if key else self.url)
        raise problem


def _info(key: str, meta: Mapping[str, Any]) -> ObjectInfo:
    """Whole seconds, as an answer to HEAD has them: an object must have only one time."""
    return ObjectInfo(key, int(meta["size"]), float(int(meta["last_modified"].timestamp())))


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except StoreError:
        return False
    return True


def parse_blob_url(url: str) -> tuple[str, str, str]:
    """Scheme as it is shown, bucket or container, and prefix (no / at either end) of a URL. StoreError."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    if scheme not in _SHOWN or not bucket or "@" in bucket:
        raise StoreError(f"{url!r} is no location of a store: expected gs://bucket/prefix or az://container/prefix")
    if prefix:
        check_name(prefix)
    return _SHOWN[scheme], bucket, prefix


def open_blobs(
    url: str,
    *,
    config: Mapping[str, Any] | None = None,
    client_options: Mapping[str, Any] | None = None,
    credential_provider: Any = None,
    many_writers: bool = False,
    connect_timeout_s: float = 4.0,
    timeout_s: float = 60.0,
    slowest_bytes_per_s: int = 256 << 10,
    connections: int = 16,
    any_names: bool = False,
) -> BlobStore:
    """The store at `gs://bucket/prefix` or `az://container/prefix`. Nothing is sent yet. StoreError: without obstore, or with settings that
    it does not take.

    `config`, `client_options`, `credential_provider`: obstore's, before the environment (AZURE_…, GOOGLE_…); az:// needs an account's name.
    `many_writers`: let several processes write to a repository though the scheme is experimental; see `fastckpt probe` first.
    `connect_timeout_s`: to connect to the server.
    `timeout_s`: a request ends with StoreUnavailableError after this time and that for its bytes (64 MiB at least) at
        `slowest_bytes_per_s`. obstore measures no progress.
    `connections`: number of connections kept open between requests.
    `any_names`: allow all names that `check_name` allows, for single objects; a repository does not need this.
    """
    scheme, bucket, prefix = parse_blob_url(url)
    numbers = {
        "connect_timeout_s": connect_timeout_s,
        "timeout_s": timeout_s,
        "slowest_bytes_per_s": slowest_bytes_per_s,
        "connections": connections,
    }
    for name, value in numbers.items():
        if not value > 0:
            raise StoreError(f"{name} is {value!r}: expected more than 0")
    place = Place(
        scheme,
        bucket,
        dict(config or {}),
        dict(client_options or {}),
        credential_provider,
        connect_timeout_s,
        timeout_s,
        slowest_bytes_per_s,
        connections,
    )
    client_of(place, 0)  # wrong settings are found now
    return BlobStore(place, prefix, any_names=any_names, many_writers=many_writers)
