"""Where lt_det keeps derived files, and how it writes them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["cache_root", "write_atomically", "write_json_atomically"]


def cache_root() -> Path:
    """``$LT_DET_CACHE`` if set, else ``~/.cache/lt_det``."""
    return Path(os.environ.get("LT_DET_CACHE") or "~/.cache/lt_det").expanduser()


def write_atomically(path: str | os.PathLike, write: Callable[[Any], None], mode: str = "w") -> None:
    """Call ``write(file)`` on a temporary file that takes the place of ``path`` when complete: readers see the old file
    or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            write(file)
        # mkstemp makes files that only their owner can read; results are for everybody.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json_atomically(path: str | os.PathLike, content: Any, *, indent: int | None = None) -> None:
    """Write ``content`` as json by :func:`write_atomically`."""
    write_atomically(path, lambda file: json.dump(content, file, indent=indent))
