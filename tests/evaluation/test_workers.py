"""Worker processes on their own. ``eval`` is a function that every process knows, with a string to send."""

import gc
import os
import time

import numpy as np
import pytest

from lt_det.evaluation.workers import WorkerError, WorkerProcesses


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_errors_and_a_light_start():
    pool = WorkerProcesses(eval, 1)
    (pid,) = pool.pids
    code = [
        "__import__('os').getpid()",
        "print('not a reply')",
        "1 / 0",
        "__import__('numpy').zeros((0, 4))",
        "__import__('lt_det.evaluation.in_loop') and sorted(__import__('sys').modules)",
        "[__import__('os').environ[k] for k in ('OMP_NUM_THREADS', 'NUMBA_NUM_THREADS')]",
    ]
    futures = [pool.submit(c) for c in code]
    assert futures[0].result() == pid != os.getpid()
    assert futures[1].result() is None
    with pytest.raises(WorkerError, match="(?s)failed in worker process.*division by zero"):
        futures[2].result()
    assert futures[3].result().shape == (0, 4)
    modules = set(futures[4].result())
    assert "lt_det.evaluation.matching" in modules and not modules & {"torch", "detectron2", "pytest"}
    assert futures[5].result() == ["1", "1"]
    with pytest.raises(WorkerError, match="ended with exit code 3"):
        pool.submit("__import__('os')._exit(3)").result()
    with pytest.raises(WorkerError, match="ended with exit code 3"):
        pool.submit("1").result()
    pool.shutdown()
    assert not is_alive(pid)


def test_arrays_arrive_whole_and_writable():
    pool = WorkerProcesses(np.negative, 2)
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((300, 28, 28), np.float32),
        rng.integers(0, 100, (7, 5))[:, ::2],
        np.asfortranarray(rng.random((40, 30))),
        rng.random((0, 3)),
    ]
    futures = [pool.submit(a) for a in arrays * 5]
    for future, array in zip(futures, arrays * 5):
        result = future.result()
        assert result.flags.writeable and result.dtype == array.dtype
        np.testing.assert_array_equal(result, -array)
    pool.shutdown()


def test_a_forgotten_pool_ends_its_processes_unless_in_a_fork():
    pool = WorkerProcesses(eval, 1)
    (pid,) = pool.pids
    child = os.fork()
    if child == 0:
        del pool
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert is_alive(pid) and pool.submit("2 + 3").result() == 5
    del pool
    gc.collect()
    for _ in range(100):
        if not is_alive(pid):
            break
        time.sleep(0.05)
    assert not is_alive(pid)
