"""Where lt_det keeps derived files, and how it writes them."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "cache_root", "write_atomically", "write_csv_atomically", "write_json_atomically"]

_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or choose another folder",
    errno.EFBIG: "files of that size are not allowed here (ulimit -f)",
    errno.EDQUOT: "free space within the quota, or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOTDIR: "a file stands where a folder of that path should be",
    errno.EEXIST: "a file stands where a folder of that path should be",
    errno.EISDIR: "a folder stands in its place",
}


def cache_root() -> Path:
    """``$LT_DET_CACHE`` if set, else ``~/.cache/lt_det``."""
    return Path(os.environ.get("LT_DET_CACHE") or "~/.cache/lt_det").expanduser()


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, of the same suffix, for the block to write a file to.

    When the block ends, the file takes the place of ``path``: readers see the old file or the new one, never a part.
    When it raises, nothing is left. Folders that are missing are made.

    Raises:
        OSError: of the kind that the system gave (``PermissionError``, ...), in one line with ``path`` and what to do.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:80]}.{secrets.token_hex(6)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or _names_another_file(error, temporary):
            raise
        remedy = _REMEDIES.get(error.errno)
        message = f"{path} cannot be written: {os.strerror(error.errno)}" + (f"; {remedy}." if remedy else ".")
        raise OSError(error.errno, message) from error
    finally:
        with suppress(OSError):  # it has taken its place, or was never made
            os.unlink(temporary)


def _names_another_file(error: OSError, temporary: Path) -> bool:
    """Whether the block failed over a file of its own, say one that it reads."""
    return error.filename is not None and not str(error.filename).startswith(str(temporary.parent))


def write_atomically(path: str | os.PathLike, write: Callable[[Any], None], mode: str = "w") -> None:
    """Call ``write(file)`` on a file opened in ``mode`` ("w" or "wb") that takes the place of ``path`` when complete.

    Raises:
        OSError: see :func:`atomic_path`.
    """
    with atomic_path(path) as temporary:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            write(file)


def write_json_atomically(path: str | os.PathLike, content: Any, *, indent: int | None = None) -> None:
    """Write ``content`` as json by :func:`write_atomically`, with ``null`` for NaN, which json does not know."""
    text = json.dumps(_without_nan(content), indent=indent)
    write_atomically(path, lambda file: file.write(text + "\n"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_csv_atomically(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write dicts with the keys ``columns`` as csv with a head by :func:`write_atomically`."""

    def write(file) -> None:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    write_atomically(path, write)
