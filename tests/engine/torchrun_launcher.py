"""torchrun in a process that has imported what a run needs, with forks of it as workers; for test_launch.py.

A worker as torchrun starts it, a fresh interpreter, would spend most of the test on imports, at every restart anew.
"""

import multiprocessing
import os
import signal
import sys

import torch
from detectron2.engine import HookBase
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from lt_det.data import register_dataset
from lt_det.engine import LongTailTrainer, launch_main, main


class Die(HookBase):
    def __init__(self, iteration: int):
        self._iteration = iteration

    def before_step(self):
        if self.trainer.iter == self._iteration:
            os.kill(os.getpid(), signal.SIGKILL)


def train(data, die, arguments):
    """tools/train_net.py on a tiny data set. Process ``die[0]`` kills itself before the iteration ``die[1]`` of the
    first start."""
    register_dataset("tiny_train", *data)
    sys.argv = ["train_net.py", *arguments]
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and int(os.environ["RANK"]) == die[0]:
        build_hooks = LongTailTrainer.build_hooks
        LongTailTrainer.build_hooks = lambda self: [*build_hooks(self), Die(die[1])]
    launch_main(main)


def torchrun(options, data, die, arguments, log):
    """What ``torchrun OPTIONS train_net.py ARGUMENTS`` does."""
    multiprocessing.set_start_method("fork", force=True)  # the command line's; this process has got its parent's
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    config, _, _ = config_from_args(get_args_parser().parse_args([*options, "train_net.py"]))
    config.start_method = "fork"
    elastic_launch(config, train)(data, die, arguments)
