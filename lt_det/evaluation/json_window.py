"""Json files as a sliding window of bytes, for files that should not be in memory at once."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

__all__ = ["JsonWindow", "open_maybe_gzip", "parse_json"]

_CHUNK = 1 << 24


def parse_json(data: bytes) -> Any:
    """Parses with orjson where it is installed; NaN and Infinity are accepted as Python's json does."""
    try:
        import orjson
    except ImportError:
        return json.loads(data)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


def open_maybe_gzip(path: str) -> tuple[BinaryIO, BinaryIO]:
    """The file of decompressed bytes, and the raw file whose position tells the progress."""
    raw = open(path, "rb")
    if raw.read(2) == b"\x1f\x8b":
        raw.seek(0)
        return gzip.GzipFile(fileobj=raw), raw
    raw.seek(0)
    return raw, raw


class JsonWindow:
    """Walks over one json file. ``text[pos:]`` are the bytes at hand."""

    def __init__(self, path: str, on_progress: Callable[[int], Any] | None = None, chunk: int = _CHUNK):
        self.path = os.fspath(path)
        self.file, self._raw = open_maybe_gzip(self.path)
        self._on_progress = on_progress
        self._chunk = chunk
        self._told = 0
        self.text = np.zeros(0, np.uint8)
        self.pos = 0
        self.at_end = False
        self.grow()
        if self.text[:3].tobytes() == b"\xef\xbb\xbf":  # byte order mark
            self.pos = 3

    def __enter__(self) -> JsonWindow:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self._raw.close()

    def grow(self) -> None:
        """Reads on; at least doubles what is unread, so that one long value costs linear time."""
        unread = len(self.text) - self.pos
        room = np.empty(unread + max(self._chunk, unread), np.uint8)
        room[:unread] = self.text[self.pos :]
        view, got = memoryview(room), unread
        try:
            while got < len(room):
                count = self.file.readinto(view[got:])
                if not count:
                    self.at_end = True
                    break
                got += count
        except (EOFError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read to its end ({error}). Is it complete?") from error
        self.text, self.pos = room[:got], 0
        if self._on_progress is not None:
            now = self._raw.tell()
            self._on_progress(now - self._told)
            self._told = now

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.path} is not valid json: {message}.")

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        from ._json_kernels import skip_space

        while True:
            self.pos = int(skip_space(self.text, self.pos))
            if self.pos < len(self.text):
                return chr(self.text[self.pos])
            if self.at_end:
                return ""
            self.grow()

    def value(self) -> bytes:
        """The bytes of the value at hand."""
        from ._json_kernels import value_end

        self.peek()
        while True:
            end = int(value_end(self.text, self.pos))
            if end >= 0:
                out = self.text[self.pos : end].tobytes()
                self.pos = end
                return out
            if self.at_end:
                raise self.fail("it ends inside of a value; the file is cut off")
            self.grow()

    def members(self) -> Iterator[str]:
        """Keys of the object at hand; the caller reads the value of each before it asks for the next."""
        self._take("{")
        while self.peek() != "}":
            if self.peek() == ",":
                self.pos += 1
                self.peek()
            key = parse_json(self.value())
            if not isinstance(key, str):
                raise self.fail(f"{key!r} stands where a name should")
            self._take(":")
            yield key
        self.pos += 1

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.fail(f"expected {character!r}, found {found!r}" if found else f"it ends before {character!r}")
        self.pos += 1

    def elements(self) -> Iterator[list[Any]]:
        """Elements of the list at hand, parsed, in lists of as many as the window holds."""
        for part in self.element_bytes():
            yield parse_json(b"[" + part.tobytes() + b"]")

    def skip_elements(self) -> None:
        """Passes over the list at hand."""
        for _ in self.element_bytes():
            pass

    def element_bytes(self) -> Iterator[np.ndarray]:
        """Elements of the list at hand as bytes with commas between, as many at a time as the window
        holds."""
        from ._json_kernels import elements_end

        self._take("[")
        closed = False
        while not closed:
            self.peek()
            if self.pos < len(self.text) and self.text[self.pos] == ord(","):
                self.pos += 1
            end, closed = elements_end(self.text, self.pos)
            if end > self.pos:
                part = self.text[self.pos : end]
                self.pos = int(end)
                yield part
            elif not closed:
                if self.at_end:
                    raise self.fail("it ends inside of a list; the file is cut off")
                self.grow()
        self._take("]")
