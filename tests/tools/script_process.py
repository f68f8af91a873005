"""What a process of a test does; in a module with a name of its own, by which the process finds it."""

import multiprocessing
import os
import runpy
import sys

import torch


def run_script(path, args, folder, repo, log):
    """In a process of its own: what ``python path args`` does in ``folder``."""
    multiprocessing.set_start_method("fork", force=True)  # the command line's; this process has got its parent's
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.chdir(folder)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=repo)
    torch.set_num_threads(1)
    sys.path.insert(0, os.path.dirname(path))
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")
