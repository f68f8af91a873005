"""The one place that makes progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(iterable: Iterable | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """A ``tqdm`` bar on a terminal. In a file, a pipe or a batch system's log, where each of its updates would be a
    line, there is none.

    Args:
        iterable: what to go through; None where ``update`` is called.
        show: False: no bar on a terminal either, as on ranks other than the first.
        options: of ``tqdm`` (``total``, ``desc``, ``unit``).
    """
    return tqdm(iterable, disable=None if show else True, **options)
