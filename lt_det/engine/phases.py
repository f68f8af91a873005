"""Phases: what changes at a given iteration of a run (the design's one mechanism for everything deferred)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from detectron2.config import CfgNode

from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import box_predictors

if TYPE_CHECKING:
    from .trainer import LongTailTrainer

logger = logging.getLogger(__name__)


class Phase(Protocol):
    """Something that holds from an iteration on."""

    start_iter: int
    # Name under which the model that the phase starts from is kept; None: it is not.
    checkpoint: str | None

    def enter(self, trainer: LongTailTrainer, *, resumed: bool) -> None:
        """Change the trainer. ``resumed``: a checkpoint from inside the phase is about to be loaded."""


class StudentPhase:
    """GML with a teacher of the run's own: the teacher is trained, and its frozen copy gives a new student its keys."""

    checkpoint = "model_teacher"

    def __init__(self, cfg: CfgNode):
        self.start_iter = cfg.TEACHER.MAX_ITER
        self._evaluate = cfg.TEACHER.EVAL

    def enter(self, trainer: LongTailTrainer, *, resumed: bool) -> None:
        if self._evaluate and not resumed:
            trainer.evaluate_stage(0)
        logger.info("Iteration %d: the teacher is trained, the student begins", self.start_iter)
        trainer.begin_student(resumed=resumed)


class DecouplePhase:
    """Stage 2 of decoupled training: freeze all but ``cls_score``, exchange the loss, start a new schedule."""

    checkpoint = "model_stage1"

    def __init__(self, cfg: CfgNode):
        start = cfg.DECOUPLE.START_ITER
        self.start_iter = cfg.TEACHER.MAX_ITER + cfg.SOLVER.MAX_ITER if start < 0 else start
        if cfg.TEACHER.MAX_ITER and self.start_iter <= cfg.TEACHER.MAX_ITER:
            raise ValueError(
                f"DECOUPLE.START_ITER is {start}, but the student begins at TEACHER.MAX_ITER = {cfg.TEACHER.MAX_ITER}; set it to "
                "-1 or to a later iteration"
            )
        self._eval_stage1 = cfg.DECOUPLE.EVAL_STAGE1
        if self.start_iter == 0 and not cfg.MODEL.WEIGHTS:
            raise ValueError(
                "DECOUPLE.START_ITER is 0, so stage 2 starts from a finished model: set MODEL.WEIGHTS to its checkpoint"
            )

    def enter(self, trainer: LongTailTrainer, *, resumed: bool) -> None:
        if self.start_iter > 0 and self._eval_stage1 and not resumed:
            trainer.evaluate_stage(1)
        logger.info("Iteration %d: stage 2 begins, the classifier alone is trained", self.start_iter)
        trainer.build_stage(2)
        if not resumed:
            # The printer shows every loss it has a history of, also those that stage 2 no longer computes.
            for known in (trainer.storage.histories(), trainer.storage.latest()):
                for name in [name for name in known if "loss" in name]:
                    del known[name]


class DRWPhase:
    """Deferred re-weighting: from its start on the loss weights its rows by class, at a lower learning rate.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, algorithm 1. Neither
    the weights nor the cut are in the model's state, so a resumed run enters the phase again; the learning rate
    comes with the checkpoint.
    """

    checkpoint = None

    def __init__(self, cfg: CfgNode):
        stage2 = stage_start(cfg, 2) if cfg.DECOUPLE.ENABLED else None
        # A run that is stage 2 alone has no SOLVER.MAX_ITER iterations.
        first_stage = cfg.SOLVER.MAX_ITER if stage2 is None else stage2 or cfg.DECOUPLE.MAX_ITER
        start = cfg.DRW.START_ITER
        self.start_iter = int(0.8 * first_stage) if start < 0 else start
        self._lr_factor = cfg.DRW.LR_FACTOR
        if self._lr_factor <= 0:
            raise ValueError(f"DRW.LR_FACTOR must be positive (1: no cut), got {self._lr_factor}")
        if self.start_iter >= total_iterations(cfg):
            raise ValueError(
                f"DRW.START_ITER is {self.start_iter}, but the run has {total_iterations(cfg)} iterations "
                "(SOLVER.MAX_ITER, and DECOUPLE.MAX_ITER of stage 2)"
            )
        in_stage2 = stage2 is not None and self.start_iter >= stage2
        key = "DECOUPLE.LOSS" if in_stage2 else "MODEL.LONG_TAIL.LOSS"
        name = cfg.DECOUPLE.LOSS if in_stage2 else cfg.MODEL.LONG_TAIL.LOSS
        if not hasattr(LOSS_REGISTRY.get(name), "set_drw"):
            able = ", ".join(sorted(n for n, loss in LOSS_REGISTRY if hasattr(loss, "set_drw")))
            raise ValueError(
                f"DRW starts at iteration {self.start_iter}, where {key} is {name!r}, which cannot be re-weighted; "
                f"losses that can: {able}. Set {key}, DRW.START_ITER, or DRW.ENABLED False"
            )

    def enter(self, trainer: LongTailTrainer, *, resumed: bool) -> None:
        for predictor in box_predictors(trainer.detector):
            predictor.loss.set_drw(True)
        logger.info("Iteration %d: re-weighting begins, learning rate times %g", self.start_iter, self._lr_factor)
        if resumed:
            return
        scheduler = trainer.scheduler
        scheduler.base_lrs = [lr * self._lr_factor for lr in scheduler.base_lrs]
        for group in trainer.optimizer.param_groups:
            group["lr"] *= self._lr_factor


def stage_start(cfg: CfgNode, stage: int) -> int:
    """The iteration at which a stage starts: 0, the teacher of GML; 1, the detector; 2, its classifier alone."""
    if stage == 2:
        return DecouplePhase(cfg).start_iter
    return cfg.TEACHER.MAX_ITER if stage == 1 else 0


def stage_config(cfg: CfgNode, stage: int) -> CfgNode:
    """A config whose ``SOLVER`` describes one stage, so that Detectron2's builders make its schedule."""
    cfg = cfg.clone()
    cfg.defrost()
    if stage == 0:
        scale = cfg.TEACHER.MAX_ITER / cfg.SOLVER.MAX_ITER
        cfg.SOLVER.STEPS = tuple(int(step * scale) for step in cfg.SOLVER.STEPS)
        cfg.SOLVER.MAX_ITER = cfg.TEACHER.MAX_ITER
    elif stage == 1:
        if cfg.DECOUPLE.ENABLED and cfg.DECOUPLE.START_ITER > 0:
            cfg.SOLVER.MAX_ITER = cfg.DECOUPLE.START_ITER - cfg.TEACHER.MAX_ITER
    else:
        cfg.SOLVER.MAX_ITER = cfg.DECOUPLE.MAX_ITER
        cfg.SOLVER.BASE_LR = cfg.DECOUPLE.BASE_LR
        cfg.SOLVER.STEPS = cfg.DECOUPLE.STEPS
        cfg.SOLVER.WARMUP_ITERS = cfg.DECOUPLE.WARMUP_ITERS
        cfg.SOLVER.BASE_LR_END = min(cfg.SOLVER.BASE_LR_END, cfg.DECOUPLE.BASE_LR)
        cfg.DATALOADER.SAMPLER_TRAIN = cfg.DECOUPLE.SAMPLER_TRAIN or cfg.DATALOADER.SAMPLER_TRAIN
    late = [step for step in cfg.SOLVER.STEPS if step >= cfg.SOLVER.MAX_ITER]
    if late:
        # Detectron2 stops at a step that falls on the end; found only when the stage begins, hours into the run.
        logger.warning("Stage %d has %d iterations; its steps at %s have no effect", stage, cfg.SOLVER.MAX_ITER, late)
        cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
    cfg.freeze()
    return cfg


def build_phases(cfg: CfgNode) -> list[Phase]:
    """The phases that a config asks for, in the order in which they start."""
    phases: list[Phase] = []
    if cfg.TEACHER.MAX_ITER:
        phases.append(StudentPhase(cfg))
    if cfg.DECOUPLE.ENABLED:
        phases.append(DecouplePhase(cfg))
    if cfg.DRW.ENABLED:
        phases.append(DRWPhase(cfg))  # after stage 2, whose loss and schedule it changes where both start together
    return sorted(phases, key=lambda phase: phase.start_iter)


def total_iterations(cfg: CfgNode) -> int:
    """Length of the whole run, all stages together."""
    if not cfg.DECOUPLE.ENABLED:
        return cfg.TEACHER.MAX_ITER + cfg.SOLVER.MAX_ITER
    return stage_start(cfg, 2) + cfg.DECOUPLE.MAX_ITER
