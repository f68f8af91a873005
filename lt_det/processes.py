"""Processes that end with the one that started them, and how many can run at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing import connection

__all__ = ["end_with_parent", "usable_cores"]


def usable_cores() -> int:
    """Processors that this process may use, which Slurm and containers restrict."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
