"""Training: plans of runs, their builders and their trainer, checkpoints, and set-up from a command line."""

from lt_det.arguments import argument_parser

from .checkpoint import LongTailCheckpointer
from .from_yaml import LongTailTrainer
from .launch import launch_main
from .setup import finish_config, get_lt_det_cfg, main, run, setup

__all__ = [
    "LongTailCheckpointer",
    "LongTailTrainer",
    "argument_parser",
    "finish_config",
    "get_lt_det_cfg",
    "launch_main",
    "main",
    "run",
    "setup",
]
