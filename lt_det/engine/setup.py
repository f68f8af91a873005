"""From a command line to a config, and from a config to a run. The tools only wire these together."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Collection, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from lt_det.config import get_lt_det_cfg
from lt_det.data import prepare_dataset, register_builtin, register_from_config, require_dataset

from .checkpoint import LongTailCheckpointer, check_weights_path
from .checks import check_config, check_keys, check_output_folder, given_keys
from .trainer import LongTailTrainer

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, unchanged."""
    return default_argument_parser()


def finish_config(cfg: CfgNode, given: Collection[str] = ()) -> CfgNode:
    """Check a config as a whole, fit it to this machine (no GPU: CPU without AMP), make its data sets known, and
    freeze it.

    Args:
        given: keys that the user set; those without effect are logged.

    Raises:
        ValueError: for keys that contradict each other, see :func:`~lt_det.engine.checks.check_config`.
    """
    log = logging.getLogger("lt_det")
    check_config(cfg, given)
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


def merged_config(config_file: str, opts: Sequence[str]) -> CfgNode:
    """Detectron2's and lt_det's defaults, then a config file, then ``KEY VALUE`` pairs.

    Raises:
        FileNotFoundError: if the file is not there.
        KeyError: for a key that does not exist; the message has similar ones.
        ValueError: for a value of the wrong type, or a key without value.
    """
    cfg = get_lt_det_cfg()
    if config_file:
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"--config-file {config_file}: no such file")
        check_keys(cfg, given_keys(config_file, ()), config_file)
        cfg.merge_from_file(config_file)
    if len(opts) % 2:
        raise ValueError(
            f"the command line ends in KEY VALUE pairs, and {' '.join(opts)!r} has a key or a value too many; a "
            "value of several words needs quotes"
        )
    check_keys(cfg, opts[::2], "command line")
    cfg.merge_from_list(list(opts))
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a command line: defaults, then ``--config-file``, then ``KEY VALUE`` pairs; logging and seeds
    set up.

    Raises:
        FileNotFoundError: if the config file, a data set or a local weights file is not there.
        KeyError, ValueError: for keys that do not exist or contradict each other.
    """
    cfg = merged_config(args.config_file, args.opts)
    check_output_folder(cfg.OUTPUT_DIR)
    rank = comm.get_rank()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="lt_det")
    finish_config(cfg, given_keys(args.config_file, args.opts))
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
    """Train, or with ``--eval-only`` evaluate, a config that ``setup`` made. Returns the results on the main
    process."""
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
