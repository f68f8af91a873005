"""Training and evaluation of LazyConfigs, with lt_det's resumption."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import weakref

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import nn

from lt_det.data import register_builtin
from lt_det.modeling import DecoupledClassifier, box_predictors

from .checkpoint import LongTailCheckpointer, check_test_classes, check_weights_path
from .checks import check_classes, check_lazy_config, check_lazy_overrides, lazy_datasets, model_classes
from .hooks import IterationSeed, PhaseHook, StageCheckpointer, StageLRScheduler
from .logs import build_writers, describe_processes, setup_logging
from .phases import DecouplePhase, DRWPhase, Phase, PhasedRun
from .run_record import RunRecord
from .setup import begin_run, prepare_output, tell_what_is_kept

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
    if cfg.train.amp.enabled and not str(cfg.train.device).startswith("cuda"):
        logger.warning("train.amp.enabled needs a GPU: it becomes False")
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
        seed=cfg.train.get("seed", 0),
        cudnn_benchmark=cfg.train.get("cudnn_benchmark", False),
    )
    if comm.is_main_process():
        LazyConfig.save(cfg, os.path.join(cfg.train.output_dir, "config.yaml"))
    what = "Evaluates" if args.eval_only else f"Trains for {cfg.train.max_iter} iterations"
    logger.info("%s %s; %s; whole log in %s", what, args.config_file, describe_processes(), log_file)
    check_weights_path(cfg.train.init_checkpoint, "train.init_checkpoint")
    return cfg


def test_lazy(cfg: DictConfig, model: nn.Module, folder: str = "") -> dict | None:
    """Evaluate on ``dataloader.test`` with ``dataloader.evaluator``, if there is one.

    Args:
        folder: below ``train.output_dir``, for the evaluator's files; by default its own ``output_dir``.
    """
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = copy.deepcopy(cfg.dataloader.evaluator)
    if folder and "output_dir" in evaluator:
        evaluator.output_dir = os.path.join(cfg.train.output_dir, folder)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _node(cfg: DictConfig, name: str, known: str) -> DictConfig | None:
    """The optional node ``train.<name>``, with no other keys than ``known``."""
    node = cfg.train.get(name)
    unknown = sorted(set(node or ()) - set(known.split()))
    if unknown:
        raise ValueError(
            f"train.{name}: unknown keys {', '.join(unknown)}; those there are: {', '.join(known.split())}"
        )
    return node


def decouple_node(cfg: DictConfig) -> DictConfig | None:
    """``train.decouple``, or None: stage 2 of decoupled training, see :class:`LazyTrainer`."""
    known = "start_iter loss reinit_classifier optimizer lr_multiplier sampler sampler_options evaluate"
    node = _node(cfg, "decouple", known)
    if node is None:
        return None
    if "loss" not in node or not 0 <= node.get("start_iter", -1) < cfg.train.max_iter:
        raise ValueError(
            f"train.decouple needs loss=L(...)(...) and start_iter, from 0 to train.max_iter ({cfg.train.max_iter}) - 1"
        )
    if node.start_iter == 0 and not cfg.train.init_checkpoint:
        raise ValueError(
            "train.decouple.start_iter is 0, so stage 2 starts from a finished model: set train.init_checkpoint to it"
        )
    return node


def set_decoupled_loss(cfg: DictConfig, model: nn.Module) -> None:
    """Exchange every box predictor's loss for that of ``train.decouple``."""
    node = decouple_node(cfg)
    for predictor in box_predictors(model):
        predictor.set_loss(instantiate(node.loss), reinit=node.get("reinit_classifier", False))


def lazy_phases(cfg: DictConfig, model: nn.Module) -> list[Phase]:
    """The phases of ``train.decouple`` and ``train.drw``, in the order in which they start.

    Raises:
        ValueError: if they do not fit the model, its loss or the length of the run.
    """
    phases: list[Phase] = []
    decouple = decouple_node(cfg)
    losses = [p.loss for p in box_predictors(model, required=False)]
    later = [] if decouple is None else [instantiate(decouple.loss)]
    if any(loss.wants_keys for loss in losses + later):
        raise ValueError(
            "GML's teacher and queues are trained by tools/train_net.py alone; train from a yaml config, or set beta "
            "and alpha of the loss to 0, which leaves its supervised part"
        )
    if decouple is not None:
        phases.append(DecouplePhase(decouple.start_iter, evaluate=decouple.get("evaluate", True)))
        instantiate(decouple.get("lr_multiplier"))  # a schedule that is wrong fails now and not hours into the run
        if not decouple.get("reinit_classifier", False):
            for predictor in box_predictors(model):
                predictor.check_fit(*later)
    drw = _node(cfg, "drw", "start_iter lr_factor")
    if drw is not None:
        start, factor = drw.get("start_iter", int(0.8 * cfg.train.max_iter)), drw.get("lr_factor", 0.1)
        if not 0 <= start < cfg.train.max_iter or factor <= 0:
            raise ValueError(
                f"train.drw: start_iter must lie between 0 and train.max_iter ({cfg.train.max_iter}) - 1 and "
                f"lr_factor be positive, got {start} and {factor}"
            )
        if decouple is not None and start >= decouple.start_iter:
            losses = later
        unable = sorted({type(loss).__name__ for loss in losses if not hasattr(loss, "set_drw")})
        if unable or not losses:
            raise ValueError(
                f"train.drw starts at iteration {start}, where the loss is {', '.join(unable) or 'none of lt_det'}, "
                "which cannot be re-weighted; take LDAM, or remove train.drw"
            )
        phases.append(DRWPhase(start, lr_factor=factor))
    return sorted(phases, key=lambda phase: phase.start_iter)


class _WithEnd(ParamScheduler):
    """Detectron2 asks for the learning rate once more after the last step, where some of fvcore's schedules have
    none."""

    def __init__(self, scheduler: ParamScheduler):
        self._scheduler = scheduler

    def __call__(self, where: float) -> float:
        return self._scheduler(min(where, 1 - 1e-9))


class LazyTrainer(PhasedRun, TrainerBase):
    """Trains what a LazyConfig describes, through the same phases as ``LongTailTrainer``.

    The config has ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader.{train, test, evaluator}`` and ``train``,
    as Detectron2's ``tools/lazyconfig_train_net.py`` has them, and in ``train``, all of them optional:

    * ``seed`` (0, the same on all ranks) seeds each iteration; the train loader should take it too.
    * ``decouple = dict(start_iter=..., loss=L(...)(...))``: from that iteration to ``max_iter`` the classifier alone is
      trained, with this loss. ``start_iter`` 0: at once, from the finished model in ``init_checkpoint``. Its other
      keys are ``optimizer`` and ``lr_multiplier`` (the run's own if not given; each stage goes through its multiplier
      whole), ``sampler`` and ``sampler_options`` (those of ``dataloader.train``), ``reinit_classifier`` (False), and
      ``evaluate`` (True: when stage 1 ends).
    * ``drw = dict(start_iter=..., lr_factor=...)``: deferred re-weighting (80 % of ``max_iter``, 0.1).

    Attributes:
        detector: the model itself, whatever wraps it for training in the present stage.
        stage: 1 or 2.
    """

    phase_keys = "train.decouple, train.drw and train.max_iter"

    def __init__(self, cfg: DictConfig):
        """
        Raises:
            ValueError: for keys that contradict each other or the model.
        """
        super().__init__()
        self.cfg = cfg
        self.seed = cfg.train.get("seed", 0)
        self.detector = instantiate(cfg.model).to(cfg.train.device)
        self._phases = lazy_phases(cfg, self.detector)
        decouple = decouple_node(cfg)
        self._stage2_start = None if decouple is None else decouple.start_iter
        self.build_stage(1)
        self._describe_losses()
        self.checkpointer = LongTailCheckpointer(
            self.detector,
            cfg.train.output_dir,
            strict=self._stage2_start == 0,  # training on top of a finished model: all of it must fit
            weights_key="train.init_checkpoint",
            trainer=weakref.proxy(self),
            run=RunRecord.from_lazy(cfg),
        )
        main = comm.is_main_process()
        self.register_hooks([
            IterationSeed(),
            PhaseHook(),
            hooks.IterationTimer(),
            StageLRScheduler(),
            hooks.PeriodicCheckpointer(self.checkpointer, **cfg.train.checkpointer) if main else None,
            StageCheckpointer(self._phases) if main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: test_lazy(cfg, self.detector)),
            hooks.PeriodicWriter(
                build_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period
            ) if main else None,
        ])  # fmt: skip

    def build_stage(self, stage: int) -> None:
        """Build what a training stage needs around the detector, whose weights stay."""
        self.stage = stage
        train, module, decouple = self.cfg.train, self.detector, {}
        length = train.max_iter if self._stage2_start is None else self._stage2_start
        if stage == 2:
            decouple = train.decouple
            length = train.max_iter - self._stage2_start
            set_decoupled_loss(self.cfg, self.detector)
            module = DecoupledClassifier(self.detector)
            self._describe_losses()
        node = copy.deepcopy(decouple.get("optimizer") or self.cfg.optimizer)
        node.params.model = module
        optimizer = instantiate(node)
        multiplier = instantiate(decouple.get("lr_multiplier") or self.cfg.lr_multiplier)
        self.scheduler = LRMultiplier(optimizer, _WithEnd(multiplier), max(1, length))
        on_gpu = str(train.device).startswith("cuda")
        wrapped = create_ddp_model(module, **train.ddp, **({} if on_gpu else {"device_ids": None}))
        # The loader is built by the first step that wants a batch: a resumed run skips straight to its own.
        self._trainer = (AMPTrainer if train.amp.enabled else SimpleTrainer)(wrapped, None, optimizer)

    def _build_loader(self):
        node = copy.deepcopy(self.cfg.dataloader.train)
        offset = self.iter
        if self.stage == 2:
            offset -= self._stage2_start
            for key in ("sampler", "sampler_options"):
                if key in self.cfg.train.decouple:
                    node[key] = self.cfg.train.decouple[key]
            if "seed" in node:
                node.seed = node.seed + 1  # images in an order of its own
        loader = instantiate(node)
        if offset and hasattr(loader, "load_state_dict"):
            loader.load_state_dict({"iteration": offset})
        return loader

    def run_step(self) -> None:
        if self._trainer.data_loader is None:
            self._trainer.reset_data_loader(self._build_loader)
        self._trainer.iter = self.iter
        self._trainer.run_step()

    @property
    def model(self) -> nn.Module:
        """What gives the losses in the present stage."""
        return self._trainer.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trainer.optimizer

    @property
    def data_loader(self):
        """The train loader of the present stage; None before its first step."""
        return self._trainer.data_loader

    def evaluate_stage(self, stage: int) -> None:
        """Evaluate at the end of a stage: files in ``inference_stage<n>``, results in the training's metrics."""
        results = test_lazy(self.cfg, self.detector, f"inference_stage{stage}")
        for name, value in flatten_results_dict(results or {}).items():
            self.storage.put_scalar(f"stage{stage}/{name}", value, smoothing_hint=False)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict(), **self.phase_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def train_lazy(cfg: DictConfig, *, resume: bool = False) -> LazyTrainer:
    """Train what a config describes, see :class:`LazyTrainer`.

    Args:
        resume: from the last checkpoint in ``train.output_dir``. lt_det's loader goes on with the next images; another
            loader starts its own order again.

    Returns:
        The trainer.
    """
    trainer = LazyTrainer(cfg)
    checkpointer = trainer.checkpointer
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return trainer


def main_lazy(args: argparse.Namespace) -> dict | LazyTrainer | None:
    """What ``tools/lazyconfig_train_net.py`` does in each process."""
    cfg = setup_lazy(args)
    if args.eval_only:
        model = instantiate(cfg.model).to(cfg.train.device)
        if decouple_node(cfg) is not None:
            set_decoupled_loss(cfg, model)  # as the last stage leaves it
        checkpointer = LongTailCheckpointer(
            model, cfg.train.output_dir, strict=True, weights_key="train.init_checkpoint"
        )
        extra = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        names = lazy_datasets(cfg, "test"), lazy_datasets(cfg, "train")
        check_test_classes(extra, checkpointer.loaded, *names, key="dataloader.test")
        return test_lazy(cfg, model)
    return train_lazy(cfg, resume=args.resume)
