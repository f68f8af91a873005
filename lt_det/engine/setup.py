"""From a command line to a config, and from a config to a run. The tools only wire these together."""

from __future__ import annotations

import argparse
import glob
import logging
import os
from collections.abc import Collection, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from lt_det.config import get_lt_det_cfg, merge_config_file
from lt_det.data import prepare_dataset, register_builtin, register_from_config, require_dataset
from lt_det.io import write_atomically
from lt_det.losses import LOSS_REGISTRY, PriorAdjustedLoss
from lt_det.modeling import box_predictors
from lt_det.processes import keep_freed_memory, usable_cores
from lt_det.tool import interruption_note

from .checkpoint import LongTailCheckpointer, check_test_classes, check_weights_path, checkpoint_files
from .checks import check_classes, check_config, check_keys, check_output_folder, given_keys, model_classes
from .from_yaml import LongTailTrainer, images_from_config
from .logit_moments import complete_calibrators
from .logs import describe_processes, setup_logging, versions

logger = logging.getLogger(__name__)


def prepare_output(folder: str, args: argparse.Namespace, weights: str = "") -> None:
    """Before a run writes anything: an earlier run in its output folder is gone on with, deleted, or an error.

    Args:
        args: with ``resume`` and ``overwrite``.
        weights: where training starts from, which is not to be deleted.

    Raises:
        FileExistsError: if there is an earlier run and ``args`` say neither.
        NotADirectoryError: if the folder is a file.
    """
    check_output_folder(folder)
    files = checkpoint_files(folder)
    comm.synchronize()  # all have looked before one deletes
    if args.resume or not files:
        return
    if not getattr(args, "overwrite", False):
        raise FileExistsError(
            f"{folder} holds a run already ({os.path.basename(files[0])}): go on with it by --resume, delete it by "
            "--overwrite, or set another OUTPUT_DIR (train.output_dir)"
        )
    if any(os.path.isfile(weights) and os.path.samefile(weights, file) for file in files):
        raise FileExistsError(
            f"--overwrite would delete {weights}, which training starts from; set another output folder"
        )
    if comm.is_main_process():
        logger.warning("--overwrite: deleting the run in %s", folder)
        old = [*files, *(os.path.join(folder, name) for name in ("last_checkpoint", "metrics.json", "config.yaml"))]
        for path in [*old, *glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*"))]:
            if os.path.exists(path):
                os.unlink(path)
    comm.synchronize()


def finish_config(cfg: CfgNode, given: Collection[str] = ()) -> CfgNode:
    """Check a config, fit it to this machine (no GPU: CPU without AMP), make its data sets known, and freeze it.

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
        if cfg.SOLVER.AMP.ENABLED:  # bfloat16 on CPUs is for those who ask for the CPU
            log.warning("SOLVER.AMP.ENABLED was meant for the GPU: it becomes False")
            cfg.SOLVER.AMP.ENABLED = False
    if cfg.DATALOADER.NUM_WORKERS > usable_cores():
        log.warning(
            "DATALOADER.NUM_WORKERS is %d, the machine has %d processors", cfg.DATALOADER.NUM_WORKERS, usable_cores()
        )
    register_builtin()
    register_from_config(cfg.DATASETS.REGISTER)
    cfg.freeze()
    return cfg


def tell_what_is_kept(folder: str) -> None:
    """On Ctrl-C, say what a run has kept in its output folder."""

    def note() -> str:
        files = checkpoint_files(folder)
        return f"Kept: {files[0]}; go on from it with --resume" if files else f"There is no checkpoint in {folder} yet"

    interruption_note[:] = [note]


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
        merge_config_file(cfg, config_file)
    if len(opts) % 2:
        raise ValueError(
            f"the command line ends in KEY VALUE pairs, and {' '.join(opts)!r} has a key or a value too many; a "
            "value of several words needs quotes"
        )
    check_keys(cfg, opts[::2], "command line")
    cfg.merge_from_list(list(opts))
    return cfg


def keep_config(cfg: CfgNode) -> None:
    """Write ``config.yaml`` to the run's folder, which exists; on the first process alone."""
    if comm.is_main_process():
        write_atomically(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), lambda file: file.write(cfg.dump()))


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a command line: defaults, ``--config-file``, ``KEY VALUE`` pairs. Logging and seeds are set up.

    Raises:
        FileNotFoundError: if the config file, a data set or a local weights file is not there.
        KeyError, ValueError: for keys that do not exist or contradict each other.
    """
    cfg = merged_config(args.config_file, args.opts)
    check_output_folder(cfg.OUTPUT_DIR)
    log_file = setup_logging(cfg.OUTPUT_DIR, rank=comm.get_rank())
    finish_config(cfg, given_keys(args.config_file, args.opts))
    if not args.eval_only:
        prepare_output(cfg.OUTPUT_DIR, args, cfg.MODEL.WEIGHTS)
    begin_run(
        args, cfg.dump(), device=cfg.MODEL.DEVICE, seed=cfg.SEED, cudnn_benchmark=cfg.CUDNN_BENCHMARK,
        float32_precision=cfg.FLOAT32_PRECISION,
    )  # fmt: skip
    keep_config(cfg)
    _describe(cfg, args, log_file)
    check_weights_path(cfg.MODEL.WEIGHTS)
    for name in cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        require_dataset(name)
    if comm.is_main_process():
        for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
            prepare_dataset(name)
    comm.synchronize()
    if not args.eval_only:
        tell_what_is_kept(cfg.OUTPUT_DIR)
        # A checkpoint's classes are compared when it is loaded.
        classes = model_classes(cfg.DATASETS.TRAIN)
        for name in cfg.DATASETS.TEST if classes else ():
            prepare_dataset(name)
            check_classes(classes, f"DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]!r}", name)
    return cfg


def begin_run(
    args: argparse.Namespace,
    config: str,
    *,
    device: str,
    seed: int,
    cudnn_benchmark: bool,
    float32_precision: str = "",
) -> None:
    """What Detectron2's ``default_setup`` does: the log file's head, random numbers by the seed (negative: none) and
    rank, PyTorch's settings. On a CPU the process keeps the memory that it frees.

    Args:
        config: the whole config as text.
        device: of the model.
        float32_precision: of matrix products and convolutions on a GPU: "highest", "high", "medium", or "": PyTorch's.

    Raises:
        ValueError: for another precision.
    """
    if float32_precision not in ("", "highest", "high", "medium"):
        raise ValueError(
            f"FLOAT32_PRECISION (train.float32_precision) is {float32_precision!r}; it is 'highest', 'high', 'medium' "
            "or '' (as PyTorch has it)"
        )
    logger.debug("Rank %d of %d. %s", comm.get_rank(), comm.get_world_size(), versions())
    logger.debug("Command line arguments: %s", args)
    if args.config_file:
        with open(args.config_file, encoding="utf-8") as f:
            logger.debug("Contents of %s:\n%s", args.config_file, f.read())
    logger.debug("Running with full config:\n%s", config)
    seed_all_rng(None if seed < 0 else seed + comm.get_rank())
    if device == "cpu":
        keep_freed_memory()
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cudnn_benchmark
    if float32_precision and torch.cuda.is_available():
        torch.set_float32_matmul_precision(float32_precision)
        torch.backends.cudnn.allow_tf32 = float32_precision != "highest"


def _loss(name: str, prior: str) -> str:
    loss = LOSS_REGISTRY.get(name)
    return f"{name} (prior: {prior})" if loss.needs_statistics or issubclass(loss, PriorAdjustedLoss) else name


def _describe(cfg: CfgNode, args: argparse.Namespace, log_file: str) -> None:
    """What a person wants to know first: what runs, on what, where its log is."""
    where = f"{describe_processes()}, {cfg.MODEL.DEVICE}; whole log and config in {log_file}"
    tests = ", ".join(cfg.DATASETS.TEST) or "no data set"
    if args.eval_only:
        logger.info("Evaluates %s on %s; %s", cfg.MODEL.WEIGHTS or cfg.OUTPUT_DIR, tests, where)
        return
    node, solver = cfg.MODEL.LONG_TAIL, cfg.SOLVER
    logger.info("Trains on %s, tests on %s; %s", ", ".join(cfg.DATASETS.TRAIN), tests, where)
    logger.info(
        "%d iterations of %d images, loss %s, sampler %s, learning rate %g, seed %s, from %s",
        solver.MAX_ITER, solver.IMS_PER_BATCH, _loss(node.LOSS, node.PRIOR), cfg.DATALOADER.SAMPLER_TRAIN,
        solver.BASE_LR, cfg.SEED if cfg.SEED >= 0 else "drawn at random", cfg.MODEL.WEIGHTS or "random weights",
    )  # fmt: skip
    if cfg.DECOUPLE.ENABLED:
        stage2 = cfg.DECOUPLE
        logger.info(
            "Stage 2, the classifier alone: %d iterations, loss %s, sampler %s, learning rate %g%s",
            stage2.MAX_ITER, _loss(stage2.LOSS, stage2.PRIOR or node.PRIOR),
            stage2.SAMPLER_TRAIN or cfg.DATALOADER.SAMPLER_TRAIN, stage2.BASE_LR,
            f", class rates learned by {cfg.META.NAME}" if cfg.META.NAME else "",
        )  # fmt: skip


def run(cfg: CfgNode, args: argparse.Namespace) -> dict | None:
    """Train, or with ``--eval-only`` evaluate, a config that ``setup`` made; with ``TEST.AUG.ENABLED`` the model is
    evaluated with test-time augmentation too. Returns the results on the main process."""
    if args.eval_only:
        model = LongTailTrainer.build_trained_model(cfg)
        checkpointer = LongTailCheckpointer(model, cfg.OUTPUT_DIR, strict=True)
        extra = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        check_test_classes(extra, checkpointer.loaded, cfg.DATASETS.TEST, cfg.DATASETS.TRAIN)
        calibrators = [p.calibrator for p in box_predictors(model, required=False)]
        complete_calibrators(partial(images_from_config, cfg), model, calibrators, checkpointer.loaded)
        results = LongTailTrainer.test(cfg, model)
    else:
        trainer = LongTailTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results, model = trainer.train(), trainer.detector
    if cfg.TEST.AUG.ENABLED:
        results = {**(results or {}), **LongTailTrainer.test_with_augmentation(cfg, model)}
    return results


def main(args: argparse.Namespace) -> dict | None:
    """What ``tools/train_net.py`` does in each process."""
    return run(setup(args), args)
