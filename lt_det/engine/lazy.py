"""From a command line to a LazyConfig, and from a LazyConfig to a run. The tool only wires these together."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from lt_det.data import register_builtin
from lt_det.modeling import box_predictors

from .checkpoint import LongTailCheckpointer, check_test_classes, check_weights_path
from .checks import check_classes, model_classes
from .checks_lazy import check_lazy_config, check_lazy_overrides, lazy_datasets
from .from_lazy import (
    LazyTrainer,
    decouple_node,
    images_from_lazy,
    set_decoupled_loss,
    test_lazy,
    test_lazy_with_augmentation,
    train_lazy,
)
from .logit_moments import complete_calibrators
from .logs import describe_processes, setup_logging
from .setup import begin_run, prepare_output, tell_what_is_kept

__all__ = ["LazyTrainer", "build_trained_lazy", "main_lazy", "setup_lazy", "test_lazy", "train_lazy"]

logger = logging.getLogger(__name__)


def setup_lazy(args: argparse.Namespace) -> DictConfig:
    """The config of a command line, fitted to this machine (no GPU: CPU without AMP); logging and seeds set up.

    Raises:
        FileNotFoundError: if the config file or a local checkpoint is not there.
    """
    if not os.path.isfile(args.config_file):
        raise FileNotFoundError(f"--config-file {args.config_file!r}: no such file")
    register_builtin()
    cfg = LazyConfig.load(args.config_file)
    check_lazy_overrides(cfg, args.opts)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    check_lazy_config(cfg)
    log_file = setup_logging(cfg.train.output_dir, rank=comm.get_rank())
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU here: train.device becomes cpu")
        cfg.train.device = "cpu"
        if cfg.train.amp.enabled:
            logger.warning("train.amp.enabled was meant for the GPU: it becomes False")
            cfg.train.amp.enabled = False
    if not args.eval_only:
        prepare_output(cfg.train.output_dir, args, cfg.train.init_checkpoint)
        tell_what_is_kept(cfg.train.output_dir)
        classes = model_classes(lazy_datasets(cfg, "train"))
        for name in lazy_datasets(cfg, "test") if classes else ():
            check_classes(classes, "the training set", name, key="dataloader.test")
    begin_run(
        args,
        str(cfg),
        device=str(cfg.train.device),
        seed=cfg.train.get("seed", 0),
        cudnn_benchmark=cfg.train.get("cudnn_benchmark", False),
        float32_precision=cfg.train.get("float32_precision", ""),
    )
    if comm.is_main_process():
        LazyConfig.save(cfg, os.path.join(cfg.train.output_dir, "config.yaml"))
    what = "Evaluates" if args.eval_only else f"Trains for {cfg.train.max_iter} iterations"
    logger.info("%s %s; %s; whole log in %s", what, args.config_file, describe_processes(), log_file)
    check_weights_path(cfg.train.init_checkpoint, "train.init_checkpoint")
    return cfg


def build_trained_lazy(cfg: DictConfig) -> nn.Module:
    """The detector as the last stage leaves it: what an evaluation loads its weights into."""
    model = instantiate(cfg.model).to(cfg.train.device)
    if decouple_node(cfg) is not None:
        set_decoupled_loss(cfg, model)
    return model


def main_lazy(args: argparse.Namespace) -> dict | LazyTrainer | None:
    """What ``tools/lazyconfig_train_net.py`` does in each process."""
    cfg = setup_lazy(args)
    if args.eval_only:
        model = build_trained_lazy(cfg)
        checkpointer = LongTailCheckpointer(
            model, cfg.train.output_dir, strict=True, weights_key="train.init_checkpoint"
        )
        extra = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        names = lazy_datasets(cfg, "test"), lazy_datasets(cfg, "train")
        check_test_classes(extra, checkpointer.loaded, *names, key="dataloader.test")
        calibrators = [p.calibrator for p in box_predictors(model, required=False)]
        complete_calibrators(partial(images_from_lazy, cfg), model, calibrators, checkpointer.loaded)
        results = test_lazy(cfg, model)
        augmented = test_lazy_with_augmentation(cfg, model)
        return results if augmented is None else {**(results or {}), **augmented}
    trainer = train_lazy(cfg, resume=args.resume)
    test_lazy_with_augmentation(cfg, trainer.detector)
    return trainer
