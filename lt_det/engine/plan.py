"""What a run is: stages one after another, and what changes at which iteration within them.

A plan holds functions and values, no config: ``from_yaml`` and ``from_lazy`` make one of either kind of config, and
:class:`~lt_det.engine.trainer.Trainer` runs it.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.engine import HookBase
from torch import nn

from lt_det.data import ClassStatistics, DatasetRecords
from lt_det.modeling import box_predictors

from .run_record import RunRecord

__all__ = ["Change", "Hooks", "Plan", "Run", "Stage", "deferred_reweighting", "stream_seed"]

logger = logging.getLogger(__name__)


class Run(Protocol):
    """What the parts of a plan see of the trainer that runs it."""

    detector: nn.Module
    seed: int
    scheduler: Any

    @property
    def module(self) -> nn.Module:
        """What gives the losses in the present stage, without what wraps it for distributed training."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def train_loader(self) -> Iterable: ...


def _detector(run: Run, resumed: bool) -> nn.Module:
    return run.detector


@dataclass(frozen=True)
class Stage:
    """A part of a run that has a module, an optimizer, a schedule, a loader, a loss and an evaluation of its own.

    Attributes:
        number: 0, the teacher of GML; 1, the detector; 2, its classifier alone.
        start_iter, end_iter: of the run; ``end_iter`` is no longer in the stage.
        optimizer: from the module to what trains it.
        schedule: from the optimizer to its learning-rate scheduler.
        loader: makes the loader of the stage, at its first image. A loader with ``load_state_dict`` resumes anywhere.
        loss: exchanges the detector's loss; None: it stays.
        module: from the run, and whether a checkpoint from inside the stage is about to be loaded, to what gives the
            losses; by default the detector.
        with_optimizer: exchanges that module for one that knows its optimizer; None: it stays.
        begin: called before the first step of the stage, never when it is resumed.
        evaluate: evaluate when the stage ends and another begins.
    """

    number: int
    start_iter: int
    end_iter: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer], Any]
    loader: Callable[[Run], Iterable]
    loss: Callable[[nn.Module], None] | None = None
    module: Callable[[Run, bool], nn.Module] = _detector
    with_optimizer: Callable[[Run, nn.Module, torch.optim.Optimizer], nn.Module] | None = None
    begin: Callable[[Run], None] | None = None
    evaluate: bool = True

    @property
    def length(self) -> int:
        """Number of iterations."""
        return self.end_iter - self.start_iter


@dataclass(frozen=True)
class Change:
    """Something that holds from an iteration on.

    Attributes:
        name: in checkpoints.
        enter: called with the run, and with whether a checkpoint from inside is about to be loaded.
        keeps: name under which the model that it starts from is kept; empty: it is not.
    """

    name: str
    start_iter: int
    enter: Callable[[Run, bool], None]
    keeps: str = ""


@dataclass(frozen=True)
class Hooks:
    """Hooks beside the trainer's own: before checkpoints are written, since they change the model; after evaluation."""

    before_saving: Sequence[HookBase] = ()
    after_evaluation: Sequence[HookBase] = ()


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        model: makes the detector, as its first stage trains it, on its device.
        stages: in order.
        changes: within them, in the order in which they start.
        seed: of the whole run, the same on all ranks.
        weights: checkpoint that the run starts from. weights_key: the config key that names it.
        phase_keys: the config keys that place stages and changes, for messages.
        record: what checkpoints say of the run.
        evaluate: from the detector and the name of a folder for the results ("": the usual one) to the results.
        images: opens the training images for a pass over them, see :mod:`lt_det.engine.logit_moments`.
        amp: mixed precision: float16 on GPUs, bfloat16 on CPUs.
        ddp: options of ``DistributedDataParallel``.
        checkpoints: options of Detectron2's ``PeriodicCheckpointer``.
        eval_period, log_period: in iterations.
        statistics: gives the classes' counts, for what is shown of learned rates; None: they are not known.
        hooks: from the trainer to more hooks.
    """

    model: Callable[[], nn.Module]
    stages: Sequence[Stage]
    changes: Sequence[Change]
    seed: int
    output_dir: str
    weights: str
    weights_key: str
    phase_keys: str
    record: RunRecord
    evaluate: Callable[[nn.Module, str], Mapping | None]
    images: Callable[[], tuple[DatasetRecords, Callable, dict]]
    amp: bool = False
    ddp: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Mapping[str, Any] = field(default_factory=lambda: {"period": 5000})
    eval_period: int = 0
    log_period: int = 20
    statistics: Callable[[], ClassStatistics] | None = None
    hooks: Callable[[Any], Hooks] = lambda trainer: Hooks()

    @property
    def max_iter(self) -> int:
        """Length of the whole run."""
        return self.stages[-1].end_iter

    def stage(self, number: int) -> Stage:
        """The stage of this number."""
        return next(stage for stage in self.stages if stage.number == number)


def stream_seed(seed: int, stream: str) -> int:
    """The seed of one of a run's streams of random numbers, in [0, 2^32).

    Args:
        seed: of the run.
        stream: its name. "stage 1", the images of the detector's stage, has the run's own seed.
    """
    if stream == "stage 1":
        return seed
    words = np.random.SeedSequence(entropy=seed, spawn_key=(zlib.crc32(stream.encode()),))
    return int(words.generate_state(1, np.uint32)[0])


def deferred_reweighting(start_iter: int, lr_factor: float) -> Change:
    """From its start on the loss weights its rows by class, at a lower learning rate.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, algorithm 1.
    Neither the weights nor the cut are in the model's state, so a resumed run enters the change again; the learning
    rate comes with the checkpoint.

    Args:
        lr_factor: multiplied to the learning rate from then on; 1: no cut.
    """

    def enter(run: Run, resumed: bool) -> None:
        for predictor in box_predictors(run.detector):
            predictor.loss.set_drw(True)
        logger.info("Iteration %d: re-weighting begins, learning rate times %g", start_iter, lr_factor)
        if resumed:
            return
        run.scheduler.base_lrs = [lr * lr_factor for lr in run.scheduler.base_lrs]
        for group in run.optimizer.param_groups:
            group["lr"] *= lr_factor

    return Change("DRWPhase", start_iter, enter)
