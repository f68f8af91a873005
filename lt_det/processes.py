"""Processes that end with the one that started them, how many can run at once, and what they do with freed memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from multiprocessing import connection

__all__ = ["end_with_parent", "keep_freed_memory", "usable_cores"]

# Of glibc's malloc.h, which mallopt(3) describes.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def usable_cores() -> int:
    """Processors that this process may use, which Slurm and containers restrict."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next. For networks on a CPU.

    glibc takes every large block from the kernel and gives it back when it is freed; so each layer's output is mapped
    and filled with zeros anew, page by page: a tenth of the time of an evaluation at 800 pixels. The process stays at
    the size of its largest moment, which the next image brings again.

    Returns:
        whether it is so: false where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have none, Windows no library of that name
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def end_with_parent(_worker: int = 0, *, poll: float = 1.0) -> None:
    """Make this process end within seconds of the one that started it, however that ended.

    A process that is killed (SIGKILL, out of memory) cannot tell its children. torch's data workers look for their
    parent while they wait for work, but hang for ever where they wait to hand over a batch.

    Args:
        _worker: nothing; so that this can be the ``worker_init_fn`` of a loader.
        poll: seconds between two looks.
    """
    parent, starter = os.getppid(), multiprocessing.parent_process()

    def watch() -> None:
        while True:
            if starter is None:
                time.sleep(poll)
            else:  # differs from the parent where a fork server came between
                connection.wait([starter.sentinel], timeout=poll)
            if os.getppid() != parent or (starter is not None and not starter.is_alive()):
                os._exit(1)  # no clean-up: what it would wait for is gone

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
