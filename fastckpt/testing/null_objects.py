"""What a null server holds: names, sizes and times of all objects, and the bytes of some."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass


class RefusedError(Exception):
    """The answer is an error of S3: status and code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.status, self.code = status, code


Piece = bytearray | int
"""Bytes, or the number of bytes that were dropped."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of a PUT: If-None-Match: *, and the ETag of If-Match."""

    none_match: bool
    match: str


@dataclass(frozen=True, slots=True)
class Held:
    """An object. `pieces` in order: one, or those of a multipart upload."""

    pieces: tuple[Piece, ...]
    etag: str
    modified_s: float

    @property
    def n_bytes(self) -> int:
        return sum(piece if isinstance(piece, int) else len(piece) for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing."""

    objects: list[tuple[str, Held]]
    folders: list[str]
    """What the names have in common up to the delimiter."""
    last: str
    """The last name that was looked at; "": there is no more after this page."""


class Objects:
    """Objects by (bucket, name), and uploads under way. Any thread; each method is atomic. Buckets exist as soon as they are named."""

    def __init__(self, pattern: bytes) -> None:
        """`pattern`: what dropped bytes are read as; it begins anew with each dropped piece."""
        self._pattern = memoryview(pattern)
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Held]] = {}
        self._uploads: dict[str, dict[int, Held]] = {}
        self._counted = 0

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._buckets.values()))

    def clear(self) -> None:
        with self._lock:
            self._buckets.clear()
            self._uploads.clear()

    def _number(self) -> str:
        self._counted += 1
        return f"{self._counted:032x}"

    def put(self, bucket: str, name: str, pieces: tuple[Piece, ...], conditions: Conditions) -> Held:
        """Hold an object. RefusedError: 412 if there is one that must not be there, or if it has another ETag than it must have."""
        with self._lock:
            names = self._buckets.setdefault(bucket, {})
            old = names.get(name)
            if conditions.none_match and old is not None:
                raise RefusedError(412, "PreconditionFailed")
            if conditions.match and old is None:
                raise RefusedError(404, "NoSuchKey")
            if conditions.match and old is not None and conditions.match.strip('"') != old.etag:
                raise RefusedError(412, "PreconditionFailed")
            names[name] = held = Held(pieces, self._number(), time.time())
            return held

    def get(self, bucket: str, name: str) -> Held:
        with self._lock:
            held = self._buckets.get(bucket, {}).get(name)
        if held is None:
            raise RefusedError(404, "NoSuchKey")
        return held

    def delete(self, bucket: str, name: str) -> None:
        with self._lock:
            self._buckets.get(bucket, {}).pop(name, None)

    def page(self, bucket: str, prefix: str, after: str, most: int, delimiter: str) -> Page:
        """Names that start with `prefix` and come after `after`, in order; `most` objects and folders together."""
        with self._lock:
            names = self._buckets.get(bucket, {})
            found = sorted((name, held) for name, held in names.items() if name.startswith(prefix) and name > after)
        page = Page([], [], "")
        for name, held in found:
            rest = name[len(prefix) :]
            folder = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else ""
            if folder and folder in (*page.folders[-1:], after):
                continue
            if len(page.objects) + len(page.folders) == most:
                last = max([*(name for name, _ in page.objects[-1:]), *page.folders[-1:]], default="")
                return Page(page.objects, page.folders, last)
            if folder:
                page.folders.append(folder)
            else:
                page.objects.append((name, held))
        return page

    def begin_upload(self) -> str:
        with self._lock:
            upload = self._number()
            self._uploads[upload] = {}
        return upload

    def put_part(self, upload: str, number: int, piece: Piece) -> Held:
        with self._lock:
            if upload not in self._uploads:
                raise RefusedError(404, "NoSuchUpload")
            self._uploads[upload][number] = held = Held((piece,), self._number(), time.time())
            return held

    def complete(self, upload: str, bucket: str, name: str, conditions: Conditions) -> Held:
        with self._lock:
            if upload not in self._uploads:
                raise RefusedError(404, "NoSuchUpload")
            parts = self._uploads[upload]
        pieces = tuple(piece for number in sorted(parts) for piece in parts[number].pieces)
        held = self.put(bucket, name, pieces, conditions)
        self.abort(upload)
        return held

    def abort(self, upload: str) -> None:
        with self._lock:
            self._uploads.pop(upload, None)

    def read(self, held: Held, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of an object, without copies."""
        at = 0
        for piece in held.pieces:
            n = piece if isinstance(piece, int) else len(piece)
            first, end = max(start - at, 0), min(stop - at, n)
            at += n
            if first >= end:
                continue
            if not isinstance(piece, int):
                yield memoryview(piece)[first:end]
                continue
            while first < end:
                offset = first % len(self._pattern)
                view = self._pattern[offset : offset + end - first]
                yield view
                first += len(view)
