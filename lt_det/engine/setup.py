"""From a command line to a config, and from a config to a run. The tools only wire these together."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from lt_det.config import get_lt_det_cfg
from lt_det.data import prepare_dataset, register_builtin, register_from_config, require_dataset

from .checkpoint import LongTailCheckpointer, check_weights_path
from .trainer import LongTailTrainer

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, unchanged."""
    return default_argument_parser()


def finish_config(cfg: CfgNode) -> CfgNode:
    """Fit a config to this machine (no GPU: CPU without AMP), make its data sets known, check them, and freeze it."""
    log = logging.getLogger("lt_det")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        log.warning("No GPU here: MODEL.DEVICE becomes cpu")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        log.warning("SOLVER.AMP.ENABLED needs a GPU: it becomes False")
        cfg.SOLVER.AMP.ENABLED = False
    register_builtin()
    register_from_config(cfg.DATASETS.REGISTER)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a command line: defaults, then ``--config-file``, then ``KEY VALUE`` pairs; logging and seeds set up.

    Raises:
        FileNotFoundError: if the config file, a data set or a local weights file is not there.
        ValueError: for contradicting keys.
    """
    cfg = get_lt_det_cfg()
    if args.config_file:
        if not os.path.isfile(args.config_file):
            raise FileNotFoundError(f"--config-file {args.config_file}: no such file")
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    rank = comm.get_rank()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="lt_det")
    finish_config(cfg)
    default_setup(cfg, args)
    check_weights_path(cfg.MODEL.WEIGHTS)
    for name in cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        require_dataset(name)
    if comm.is_main_process():
        for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
            prepare_dataset(name)
    comm.synchronize()
    return cfg


def run(cfg: CfgNode, args: argparse.Namespace) -> dict | None:
    """Train, or with ``--eval-only`` evaluate, a config that ``setup`` made. Returns the results on the main process."""
    if args.eval_only:
        model = LongTailTrainer.build_trained_model(cfg)
        LongTailCheckpointer(model, cfg.OUTPUT_DIR, strict=True).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return LongTailTrainer.test(cfg, model)
    trainer = LongTailTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(args: argparse.Namespace) -> dict | None:
    """What ``tools/train_net.py`` does in each process."""
    return run(setup(args), args)


def launch_main(run_one: Callable[[argparse.Namespace], object], args: argparse.Namespace | None = None) -> None:
    """Run a tool's main function in as many processes as its command line asks for.

    Args:
        run_one: called with ``args`` in each process.
        args: with Detectron2's arguments; by default those of this process's command line.
    """
    args = argument_parser().parse_args() if args is None else args
    launch(
        run_one,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
