"""A run of all-reduces by Detectron2's launcher, in which process 1 kills itself; for test_launch.py.

usage: launch_script.py FOLDER ARGS...    FOLDER: every process leaves a file named by its id there
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lt_det.engine import argument_parser, launch_main


def run_one(args):
    (Path(args.folder) / str(os.getpid())).touch()
    for step in range(600):
        dist.all_reduce(torch.ones(3))
        if step == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    folder, *argv = sys.argv[1:]
    args = argument_parser().parse_args(argv)
    args.folder = folder
    (Path(folder) / str(os.getpid())).touch()
    launch_main(run_one, args)
