"""Training: the trainer, its phases and hooks, checkpoints, and set-up from a command line."""

from .checkpoint import LongTailCheckpointer
from .launch import launch_main
from .setup import argument_parser, finish_config, get_lt_det_cfg, main, run, setup
from .trainer import LongTailTrainer

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
