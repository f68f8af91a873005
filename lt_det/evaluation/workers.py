"""A function in processes of its own, started light and apart from what the caller has loaded.

``multiprocessing`` would serve but for its start: after CUDA is initialised it must not fork, and what it
spawns imports the caller's main module again (of a training script: torch, Detectron2 and the models) in
every worker. Here a worker imports what the function needs and nothing else, and a script needs no
``if __name__ == "__main__"``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

__all__ = ["WorkerError", "WorkerProcesses"]

_START = "import sys; sys.path[:] = {path!r}; from lt_det.evaluation.workers import serve; serve()"
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerError(RuntimeError):
    """The function failed in a worker (the message holds the worker's traceback), or a worker died."""


class WorkerProcesses:
    """``function(argument)`` in ``num_processes`` processes. Results are futures, as of an executor.

    A thread for each process hands over the arguments and waits for the results: it copies arrays into a pipe
    without the GIL and computes nothing. The processes start at once, and the constructor does not wait for
    them. Each has one thread for numerical libraries.

    Args:
        function: sent once to every process. It, arguments and results must be picklable; import light.
        num_processes: at least 1.
    """

    def __init__(self, function: Callable[[Any], Any], num_processes: int):
        # From the calling thread: another thread could start a process between the creation of a pipe and
        # the closing of its far end here, and a fork in that moment would keep the end open.
        self._workers = [_Worker(function) for _ in range(num_processes)]
        self._end = weakref.finalize(self, _kill, self._workers, os.getpid())
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="lt_det_worker")

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def submit(self, argument: Any) -> Future:
        """Future of ``function(argument)``; its ``result()`` raises :class:`WorkerError` on a failure."""
        return self._threads.submit(_call, self._idle, argument)

    def shutdown(self, cancel_futures: bool = False) -> None:
        """Waits for what has begun (and, unless ``cancel_futures``, for all else) and ends the processes."""
        self._threads.shutdown(wait=True, cancel_futures=cancel_futures)
        self._end()


class _Worker:
    """The caller's side of one process."""

    def __init__(self, function: Callable[[Any], Any]):
        path = [os.path.abspath(entry) for entry in sys.path]  # "" is the working directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **dict.fromkeys(_ONE_THREAD, "1")},
        )
        self._function = function
        self._has_function = False

    def call(self, argument: Any) -> Any:
        pid = self.process.pid
        try:
            if not self._has_function:
                _send(self.process.stdin, self._function)
                self._has_function = True
            _send(self.process.stdin, argument)
            succeeded, result = _receive(self.process.stdout)
        except (BrokenPipeError, EOFError):
            raise WorkerError(f"worker process {pid} ended {self._how_it_ended()}.") from None
        if not succeeded:
            raise WorkerError(f"failed in worker process {pid}:\n{result}")
        return result

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"with exit code {code}; its own message stands above"
        if -code == signal.SIGKILL:
            return "by SIGKILL. Memory may have run out: use fewer processes"
        return f"by {signal.Signals(-code).name}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of what a failed send left in the buffer
                pipe.close()


def _call(idle: queue.SimpleQueue[_Worker], argument: Any) -> Any:
    worker = idle.get()
    try:
        return worker.call(argument)
    finally:
        idle.put(worker)


def _kill(workers: list[_Worker], owner: int) -> None:
    """Workers hold nothing that outlives them, so a kill is enough. An end of their input would not be: forks
    of the caller (of a data loader) may hold the pipes open."""
    if os.getpid() == owner:  # not when a fork forgets its copy of the pool
        for worker in workers:
            worker.kill()


# ---------------------------------------------------------------------- both sides


def _send(pipe: BinaryIO, message: Any) -> None:
    """Arrays go from their own memory into the pipe, outside of the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(message, protocol=5, buffer_callback=buffers.append))]
    parts += [buffer.raw() for buffer in buffers]
    pipe.write(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(len(part) for part in parts)))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    (number,) = struct.unpack("<Q", _read(pipe, 8))
    text, *buffers = [_read(pipe, size) for size in struct.unpack(f"<{number}Q", _read(pipe, 8 * number))]
    return pickle.loads(text, buffers=buffers)


def _read(pipe: BinaryIO, size: int) -> bytearray:
    out = bytearray(size)  # writable, and so the arrays made of it: numba compiles again for others
    if pipe.readinto(out) < size:
        raise EOFError
    return out


# ---------------------------------------------------------------------- the worker's side


def serve() -> None:
    """Main function of a worker process: the function first, then arguments, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends the workers
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not get between the replies
    with contextlib.suppress(EOFError):  # the caller was killed
        function = _receive(requests)
        while True:
            argument = _receive(requests)
            try:
                reply = (True, function(argument))
            except Exception:
                reply = (False, traceback.format_exc())
            _send(replies, reply)
