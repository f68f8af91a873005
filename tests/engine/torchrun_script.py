"""tools/train_net.py on a tiny data set, with a process that kills itself; for test_launch.py, as torchrun starts it.

usage: torchrun_script.py JSON IMAGES DIE ARGS...    DIE: "rank,iteration" of the first start, or "-"
"""

import os
import signal
import sys

from detectron2.engine import HookBase

from lt_det.data import register_dataset
from lt_det.engine import LongTailTrainer, launch_main, main


class Die(HookBase):
    def __init__(self, iteration: int):
        self._iteration = iteration

    def before_step(self):
        if self.trainer.iter == self._iteration:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    json_file, images, die, *sys.argv[1:] = sys.argv[1:]
    register_dataset("tiny_train", json_file, images)
    build_hooks = LongTailTrainer.build_hooks
    if die != "-" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == die.split(",")[0]:
        LongTailTrainer.build_hooks = lambda self: [*build_hooks(self), Die(int(die.split(",")[1]))]
    launch_main(main)
