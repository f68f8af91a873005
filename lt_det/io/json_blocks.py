"""Read a large json file, gzip too, in blocks of whole array elements.

LVIS v1's training annotations are 1.1 GB of text and 6 GB of Python objects once parsed. Here a few MB of the file are
in memory at a time, and decoding is left to a library that is given whole elements.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import msgspec

__all__ = ["first_character", "iter_json_blocks", "iter_json_list", "with_json_module"]

_SPACE = re.compile(rb"[ \t\n\r]*")
_TEXT_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN_OBJECTS = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*\{")
_ARRAY_END = re.compile(rb"\}[ \t\n\r]*\][ \t\n\r]*(?:,[ \t\n\r]*\"|\})")
_BLOCK = 2 << 20  # what is made of one stays in a processor's cache, and the allocator keeps its memory for the next
_TAIL = 1 << 16  # how far back from the end of a block its last element is looked for
_TEXT_DECODER = json.JSONDecoder()
_SELF_DELIMITED = tuple('"{[')
# What must follow a number for it not to be the first part of a longer one ("1." of "1.5e3").
_AFTER_NUMBER = tuple(",]} \t\n\r")


class _Window:
    """The part of the file that has been read and not yet used; ``pos`` is where the next token is looked for."""

    def __init__(self, file: Any, path: str, block_bytes: int, on_read: Callable[[bytes], Any] | None):
        self._file, self._path, self._on_read = file, path, on_read
        self.block_bytes = block_bytes
        self.data, self.pos, self.at_end = b"", 0, False

    def fail(self, message: str) -> ValueError:
        return ValueError(
            f"{self._path} is not a complete LVIS or COCO json file ({message}). It may be cut off: compare its size "
            "with the original and download or write it again."
        )

    def fill(self, size: int) -> None:
        """Have at least ``size`` unused bytes, unless the file ends before."""
        missing = size - (len(self.data) - self.pos)
        if missing <= 0 or self.at_end:
            return
        try:
            more = self._file.read(missing)
        except (EOFError, OSError, zlib.error) as error:  # of gzip, mostly
            raise ValueError(
                f"{self._path} cannot be read to its end ({error}). It is damaged or cut off: get it again."
            ) from error
        if self._on_read is not None:
            self._on_read(more)
        self.at_end = len(more) < missing
        self.data = self.data[self.pos :] + more
        self.pos = 0

    def peek(self) -> bytes:
        """The next byte that is not white space; empty at the end of the file."""
        while True:
            self.pos = _SPACE.match(self.data, self.pos).end()
            if self.pos < len(self.data) or self.at_end:
                return self.data[self.pos : self.pos + 1]
            self.fill(self.block_bytes)

    def cut(self) -> tuple[bytes, bytes] | None:
        """The text of a block of objects, from here to the last place that looks like the space between two, as an
        array; and that space, with its comma. None where no block is left."""
        self.fill(self.block_bytes)
        if len(self.data) - self.pos < self.block_bytes or (space := self.last_space()) is None:
            return None
        end = space.start() + 1
        text, self.pos = self.array_to(end), space.end() - 1
        return text, self.data[end : self.pos]

    def last_space(self) -> re.Match[bytes] | None:
        """The last ``}, {`` of the data, looked for in their tail."""
        spaces = deque(_BETWEEN_OBJECTS.finditer(self.data, max(self.pos, len(self.data) - _TAIL)), maxlen=1)
        return spaces[0] if spaces else None

    def array_to(self, end: int) -> bytes:
        """The text from here to ``end`` as an array."""
        return b"".join((b"[", memoryview(self.data)[self.pos : end], b"]"))  # copied once

    def put_back(self, cuts: Iterable[tuple[bytes, bytes]]) -> None:
        """Undo the last cuts."""
        texts = (part for text, space in cuts for part in (text[1:-1], space))
        self.data, self.pos = b"".join((*texts, self.data[self.pos :])), 0

    def expect(self, characters: bytes) -> bytes:
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(repr(chr(c)) for c in characters)
            shown = found.decode(errors="replace")
            raise self.fail(f"expected {wanted}, found {shown!r}" if found else "it ends early")
        self.pos += 1
        return found

    def value(self) -> Any:
        """Decode one value of any size with the standard library's scanner."""
        self.peek()
        size = self.block_bytes
        while True:
            self.fill(size)
            text = self._text(self.data[self.pos : self.pos + size])
            try:
                value, end = _TEXT_DECODER.raw_decode(text)
                whole = text[:1] in _SELF_DELIMITED or text[end : end + 1] in _AFTER_NUMBER
                if whole or (self.at_end and self.pos + size >= len(self.data)):
                    self.pos += len(text[:end].encode())
                    return value
            except ValueError as error:
                if self.at_end and self.pos + size >= len(self.data):
                    raise self.fail(str(error)) from error
            size *= 2

    def _text(self, data: bytes) -> str:
        # The end of the data may cut a character of up to four bytes.
        for cut in range(4):
            try:
                return data[: len(data) - cut].decode("utf-8")
            except UnicodeDecodeError as error:
                if error.start < len(data) - 4:
                    raise self.fail(f"not UTF-8 text: {error}") from error
        raise self.fail("not UTF-8 text")


@contextlib.contextmanager
def _opened(path: str, block_bytes: int, on_read: Callable[[bytes], Any] | None) -> Iterator[_Window]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        window = _Window(gzip.GzipFile(fileobj=raw) if packed else raw, path, block_bytes, on_read)
        window.fill(3)
        if window.data == b"\xef\xbb\xbf":  # byte order mark
            window.pos = 3
        try:
            yield window
        except RecursionError as error:
            raise window.fail("it nests too deeply") from error


def with_json_module(decoder: msgspec.json.Decoder) -> Callable[[bytes], list]:
    """``decoder.decode``, or Python's json module for blocks of another shape than the decoder's, and with what msgspec
    does not read: NaN, Infinity, lone surrogates."""

    def decode(block: bytes) -> list:
        try:
            return decoder.decode(block)
        except msgspec.ValidationError:
            return json.loads(block)
        except msgspec.DecodeError:
            if b"NaN" in block or b"Infinity" in block or b"\\u" in block:
                return json.loads(block)
            raise

    return decode


def first_character(path: str) -> str:
    """The first character of a json file that is not white space, "" for an empty file."""
    with _opened(path, 1 << 12, None) as window:
        return window.peek().decode("latin-1")


def iter_json_list(
    path: str,
    decode: Callable[[bytes], list],
    *,
    block_bytes: int = _BLOCK,
    on_read: Callable[[bytes], Any] | None = None,
    num_threads: int = 1,
) -> Iterator[list]:
    """Walk over a json file whose top level is a list; arguments and errors as of :func:`iter_json_blocks`.

    Args:
        num_threads: that decode blocks ahead of the caller.
    """
    with _opened(path, block_bytes, on_read) as window, ThreadPoolExecutor(num_threads) as pool:
        window.expect(b"[")
        yield from _decoded_ahead(window, decode, pool, 2 * num_threads)
        yield from _array_blocks(window, decode)
        if found := window.peek():
            raise window.fail(f"{found.decode(errors='replace')!r} stands behind the end of the list")


def _decoded_ahead(window: _Window, decode: Callable[[bytes], list], pool: Executor, most: int) -> Iterator[list]:
    """Blocks of objects from the first on, decoded while the caller works on those before. Ends where a block is not
    one, or at the file's last block, of which nothing is taken then."""
    window.peek()
    ahead: deque[tuple[tuple[bytes, bytes], Future]] = deque()
    try:
        while True:
            while len(ahead) < most and (block := window.cut()) is not None:
                ahead.append((block, pool.submit(decode, block[0])))
            if not ahead:
                return
            try:
                decoded = ahead[0][1].result()
            except ValueError:  # what looked like the space between two objects stood in a text, say
                return
            ahead.popleft()
            yield decoded
    finally:
        window.put_back(block for block, _ in ahead)


def iter_json_blocks(
    path: str,
    decoders: dict[str, Callable[[bytes], list]],
    *,
    block_bytes: int = _BLOCK,
    on_read: Callable[[bytes], Any] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Walk over the members of a json file whose top level is an object.

    Args:
        path: the file.
        decoders: for each member that is a long array, what decodes the text of an array (bytes, from ``[`` to ``]``)
            to a list, or raises ``ValueError`` where the text is not one whole json array.
        block_bytes: size of the pieces. One element may be larger.
        on_read: called with each piece of the file that is read (for a progress bar, or a hash).

    Yields:
        ``(name, list)`` for pieces of the arrays in ``decoders``, at least one for each array, and ``(name, value)``
        for every other member, in the order of the file.

    Raises:
        ValueError: the file is not json, is cut off, or a member in ``decoders`` is not an array.
    """
    with _opened(path, block_bytes, on_read) as window:
        window.expect(b"{")
        if window.peek() == b"}":
            return
        while True:
            if window.peek() != b'"':
                raise window.fail("a member name is missing")
            name = window.value()
            window.expect(b":")
            if name in decoders:
                window.expect(b"[")
                for block in _array_blocks(window, decoders[name]):
                    yield name, block
            else:
                yield name, window.value()
            if window.expect(b",}") == b"}":
                window.fill(1 << 20)  # the rest belongs to the file's hash
                while not window.at_end:
                    window.pos = len(window.data)
                    window.fill(1 << 20)
                return


def _array_blocks(window: _Window, decode: Callable[[bytes], list]) -> Iterator[list]:
    """The rest of an array, behind its ``[`` or a comma."""
    if window.peek() == b"]":
        window.pos += 1
        yield []
        return
    while True:
        window.peek()
        window.fill(window.block_bytes)
        block, length = _cut_after_object(window, decode)
        if block is None:
            block, length = _scan(window, decode)
        window.pos += length
        yield block
        if window.expect(b",]") == b"]":
            return


def _cut_after_object(window: _Window, decode: Callable[[bytes], list]) -> tuple[list | None, int]:
    """The objects up to the last ``}, {`` of the window, or up to the first ``}]`` that may end the array.

    That ``[`` + text + ``]`` is json proves the guess: a text that begins with an element and is completed to an array
    by one bracket holds whole elements of that array alone.
    """
    last = window.last_space()
    for guesses in ([last] if last else [], _ARRAY_END.finditer(window.data, window.pos)):
        for guess in itertools.islice(guesses, 2):
            end = guess.start() + 1
            with contextlib.suppress(ValueError):
                return decode(window.array_to(end)), end - window.pos
    return None, 0


def _scan(window: _Window, decode: Callable[[bytes], list]) -> tuple[list, int]:
    """As many whole elements as a block holds, by the standard library's scanner: at the end of the array, say."""
    size = window.block_bytes
    while True:
        window.fill(size)
        text = window._text(window.data[window.pos : window.pos + size])
        end = _whole_elements(text)
        if end:
            break
        if window.at_end and window.pos + size >= len(window.data):
            raise window.fail("an array does not end")
        size *= 2
    raw = text[:end].encode()
    try:
        return decode(b"[" + raw + b"]"), len(raw)
    except ValueError as error:
        raise window.fail(str(error)) from error


def _whole_elements(text: str) -> int:
    """Length of the elements of an array, separated by commas, that ``text`` begins with."""
    end = at = 0
    while True:
        try:
            _, stop = _TEXT_DECODER.raw_decode(text, at)
        except ValueError:  # not whole, or an integer of thousands of digits
            return end
        if text[at] not in _SELF_DELIMITED and text[stop : stop + 1] not in _AFTER_NUMBER:
            return end  # perhaps the first part of a number
        end = stop
        comma = _TEXT_SPACE.match(text, end).end()
        if text[comma : comma + 1] != ",":
            return end
        at = _TEXT_SPACE.match(text, comma + 1).end()
