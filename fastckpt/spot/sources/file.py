"""A notice that somebody gives by creating a file."""

from __future__ import annotations

import os

from fastckpt.spot.notice import Notice


class FileSource:
    """A file whose appearance is the notice; its first line may hold the seconds left. Removing the file does not withdraw the notice."""

    def __init__(self, path: str | os.PathLike[str], default_left_s: float | None = None) -> None:
        self._path = os.fspath(path)
        self.name = f"file {self._path}"
        self._default_left_s = default_left_s
        self._seen = False

    def poll(self, now_s: float) -> list[Notice]:
        if self._seen:
            return []
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                text = file.read(4096).strip()
        except FileNotFoundError:
            return []
        self._seen = True
        left_s = self._default_left_s
        try:
            value = float(text.splitlines()[0])
            left_s = value if 0 <= value < 1e6 else left_s
        except (ValueError, IndexError):
            pass  # the existence of the file is the notice
        return [Notice("file", self.name, None if left_s is None else now_s + left_s, text[:200])]
