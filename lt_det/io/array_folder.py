"""Arrays kept as ``.npy`` files in one folder, written once, checked, and mapped by all processes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ArrayFolderWriter", "CheckedArray", "CorruptFolderError", "open_array_folder"]

_MANIFEST = "manifest.json"
_BLOCK = 1 << 16  # bytes under one checksum of an array that is checked as it is read


class CorruptFolderError(ValueError):
    """What is on disk is not what was written."""


class CheckedArray:
    """A 1-d array whose parts are compared with their checksums when they are first read in this process."""

    def __init__(self, array: np.ndarray, sums: np.ndarray | None, name: str):
        """``sums``: one CRC-32 for each 64 KB; None for an array in memory, which is not checked."""
        self._array, self._sums, self._name = array, sums, name
        self._checked = None if sums is None else np.zeros(len(sums), dtype=bool)

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop``.

        Raises:
            CorruptFolderError: these bytes are not those that were written.
        """
        if self._checked is not None and stop > start:
            size = self._array.itemsize
            first, last = start * size // _BLOCK, (stop * size - 1) // _BLOCK
            if not self._checked[first : last + 1].all():
                self._check(first, last)
        return self._array[start:stop]

    def _check(self, first: int, last: int) -> None:
        step = _BLOCK // self._array.itemsize
        for block in range(first, last + 1):
            if zlib.crc32(self._array[block * step : (block + 1) * step]) != self._sums[block]:
                raise CorruptFolderError(f"{self._name} is damaged (wrong checksum at byte {block * _BLOCK})")
            self._checked[block] = True


class ArrayFolderWriter:
    """Fills a folder that takes its final name when it is complete, so that nobody sees a part of it.

    Use as a context manager; leaving it by an exception removes what was written.
    """

    def __init__(self, parent: str | os.PathLike):
        parent = Path(parent)
        parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=parent, prefix=".writing-"))
        os.chmod(self.folder, 0o777 & ~_umask())
        self._arrays: dict[str, dict] = {}
        self._streams: dict[str, _Stream] = {}

    def __enter__(self) -> ArrayFolderWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        for stream in self._streams.values():
            stream.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # nothing is left there after finish()

    def stream(self, name: str, dtype: Any) -> Callable[[np.ndarray], None]:
        """A function that appends to the 1-d array ``name``, which will be read through :class:`CheckedArray`."""
        self._streams[name] = _Stream(self.folder / f"{name}.npy", np.dtype(dtype))
        return self._streams[name].append

    def add(self, name: str, array: np.ndarray) -> None:
        """Write a whole array, which will be checked when the folder is opened."""
        array = np.ascontiguousarray(array)
        with open(self.folder / f"{name}.npy", "wb") as file:
            np.save(file, array)
        self._arrays[name] = {"shape": array.shape, "dtype": array.dtype.str, "crc32": zlib.crc32(array)}

    def finish(self, target: Path, meta: Mapping[str, Any]) -> None:
        """Write the manifest with ``meta`` (a json value) and put the folder at ``target``, unless one is there."""
        for name, stream in self._streams.items():
            shape, sums = stream.finish()
            self.add(f"{name}.crc32", sums)
            self._arrays[name] = {"shape": shape, "dtype": stream.dtype.str, "crc32": None}
        (self.folder / _MANIFEST).write_text(json.dumps({"arrays": self._arrays, "meta": meta}), encoding="utf-8")
        try:
            os.rename(self.folder, target)
        except OSError:
            if not (target / _MANIFEST).is_file():  # else somebody else was as fast
                raise


class _Stream:
    def __init__(self, path: Path, dtype: np.dtype):
        self.file = open(path, "wb")
        self.dtype = dtype
        self._length, self._sums, self._rest = 0, [], b""
        self._header = self._write_header(0)

    def _write_header(self, length: int) -> int:
        # numpy leaves room in the header for the first dimension to grow.
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()

    def append(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array, dtype=self.dtype)).cast("B")
        self._length += len(data) // self.dtype.itemsize
        self.file.write(data)
        start = 0
        if self._rest:
            start = min(_BLOCK - len(self._rest), len(data))
            self._rest += data[:start]
            if len(self._rest) < _BLOCK:
                return
            self._sums.append(zlib.crc32(self._rest))
        whole = start + (len(data) - start) // _BLOCK * _BLOCK
        self._sums += [zlib.crc32(data[i : i + _BLOCK]) for i in range(start, whole, _BLOCK)]
        self._rest = bytes(data[whole:])

    def finish(self) -> tuple[tuple[int], np.ndarray]:
        if self._rest:
            self._sums.append(zlib.crc32(self._rest))
        if self._write_header(self._length) != self._header:
            raise AssertionError("numpy wrote headers of two lengths")
        self.file.close()
        return (self._length,), np.array(self._sums, dtype=np.uint32)


def open_array_folder(folder: Path) -> tuple[dict[str, np.ndarray | CheckedArray], dict]:
    """Map a folder's arrays (read-only), after checking that they are as they were written.

    Returns:
        The arrays by name (streamed ones as :class:`CheckedArray`), and the ``meta`` of the manifest.

    Raises:
        CorruptFolderError: a file is missing, cut, changed or unreadable.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        entries, meta = manifest["arrays"], manifest["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFolderError(f"{folder / _MANIFEST} is damaged ({error})") from error
    arrays = {}
    for name, entry in entries.items():
        path = folder / f"{name}.npy"
        try:
            # An empty array cannot be mapped.
            array = np.load(path, mmap_mode="r" if np.prod(entry["shape"]) else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CorruptFolderError(f"{path} is damaged ({error})") from error
        if list(array.shape) != list(entry["shape"]) or array.dtype.str != entry["dtype"]:
            raise CorruptFolderError(f"{path} is damaged (another shape or type than was written)")
        if entry["crc32"] is not None and zlib.crc32(np.ascontiguousarray(array)) != entry["crc32"]:
            raise CorruptFolderError(f"{path} is damaged (wrong checksum)")
        arrays[name] = array.view(np.ndarray)
    for name in [n for n, entry in entries.items() if entry["crc32"] is None]:
        arrays[name] = CheckedArray(arrays[name], arrays.pop(f"{name}.crc32"), str(folder / f"{name}.npy"))
    return arrays, meta


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
