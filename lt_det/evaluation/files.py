"""How the evaluation writes its files."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Callable

__all__ = ["write_atomically"]


def write_atomically(path: str, write: Callable[[Any], None], mode: str = "w") -> None:
    """Calls ``write(file)`` on a temporary file that takes the place of ``path`` when complete."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as f:
            write(f)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives a file to its owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
