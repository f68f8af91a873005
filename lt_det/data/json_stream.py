"""Read LVIS and COCO json files piece by piece, in memory that does not grow with the file.

The LVIS v1 training annotations are 1.1 GB of text and about 6 GB of Python objects once parsed. Counting
categories needs none of it at once: :func:`iter_json_members` walks over the members of the top-level
object and hands out the elements of its long arrays one by one, decoded by the C scanner of the standard
library.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

__all__ = ["iter_json_members"]

_CHUNK_BYTES = 1 << 22
_NON_SPACE = re.compile(r"[^ \t\n\r]")
# A number that the end of a chunk cuts ("1." of "1.5e3") still decodes, to another number; it is whole only
# if one of these follows. Objects, arrays and strings end in a character of their own.
_AFTER_NUMBER = ",]} \t\n\r"
_SELF_DELIMITED = '"{['


class _Reader:
    """A sliding window of decoded text over a binary file."""

    def __init__(self, file: BinaryIO, path: str, on_read: Callable[[int], Any] | None):
        self._file = file
        self._path = path
        self._on_read = on_read
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self.text = ""
        self.pos = 0
        self.at_end = False

    def fail(self, message: str) -> ValueError:
        return ValueError(
            f"{self._path} is not a complete LVIS or COCO json file ({message}). "
            "It may be cut off: compare its size with the original and download or write it again."
        )

    def _grow(self) -> None:
        # At least double the unread text, so that one very long element costs linear time.
        data = self._file.read(max(_CHUNK_BYTES, len(self.text) - self.pos))
        if self._on_read is not None:
            self._on_read(len(data))
        self.at_end = not data
        try:
            more = self._utf8.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            raise self.fail(f"not UTF-8 text: {error}") from error
        self.text = self.text[self.pos :] + more
        self.pos = 0

    def peek(self) -> str:
        """Next character that is not white space; empty at the end of the file."""
        while True:
            match = _NON_SPACE.search(self.text, self.pos)
            if match:
                self.pos = match.start()
                return match.group()
            if self.at_end:
                return ""
            self.pos = len(self.text)
            self._grow()

    def expect(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(repr(c) for c in characters)
            raise self.fail(f"expected {wanted}, found {found!r}" if found else f"ends before {wanted}")
        self.pos += 1
        return found

    def value(self) -> Any:
        """Decode one whole value at the current position."""
        first = self.peek()
        while True:
            try:
                value, end = self._scan(self.text, self.pos)
                follower = self.text[end : end + 1]
                if first in _SELF_DELIMITED or (follower and follower in _AFTER_NUMBER) or self.at_end:
                    self.pos = end
                    return value
            except json.JSONDecodeError as error:
                if self.at_end:
                    raise self.fail(str(error)) from error
            self._grow()


def iter_json_members(
    path: str,
    arrays: tuple[str, ...],
    *,
    members: set[str] | None = None,
    on_read: Callable[[int], Any] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Walk over the top-level object of a json file without holding it in memory.

    Args:
        path: a json file whose top level is an object.
        arrays: names of members that are arrays to be handed out element by element.
        members: if given, filled with the names of all members met (an empty array yields no element).
        on_read: called with the number of bytes of every chunk read (for a progress bar).

    Yields:
        ``(name, element)`` for each element of each array named in ``arrays``, and ``(name, value)`` for
        every other member, in the order of the file.

    Raises:
        ValueError: the file is not json, is cut off, or a member named in ``arrays`` is not an array.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, path, on_read)
        reader.expect("{")
        if reader.peek() == "}":
            return
        while True:
            if reader.peek() != '"':
                raise reader.fail("a member name is missing")
            name = reader.value()
            if members is not None:
                members.add(name)
            reader.expect(":")
            if name not in arrays:
                yield name, reader.value()
            else:
                reader.expect("[")
                if reader.peek() == "]":
                    reader.pos += 1
                else:
                    while True:
                        yield name, reader.value()
                        if reader.expect(",]") == "]":
                            break
            if reader.expect(",}") == "}":
                return
