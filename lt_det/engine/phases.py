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

    def __init__(self, start_iter: int, *, evaluate: bool):
        """
        Args:
            evaluate: evaluate when stage 1 ends.
        """
        self.start_iter = start_iter
        self._evaluate = evaluate

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DecouplePhase:
        start = cfg.DECOUPLE.START_ITER
        start_iter = cfg.TEACHER.MAX_ITER + cfg.SOLVER.MAX_ITER if start < 0 else start
        if cfg.TEACHER.MAX_ITER and start_iter <= cfg.TEACHER.MAX_ITER:
            raise ValueError(
                f"DECOUPLE.START_ITER is {start}, but the student begins at TEACHER.MAX_ITER = {cfg.TEACHER.MAX_ITER}; "
                "set it to -1 or to a later iteration"
            )
        if start_iter == 0 and not cfg.MODEL.WEIGHTS:
            raise ValueError(
                "DECOUPLE.START_ITER is 0, so stage 2 starts from a finished model: set MODEL.WEIGHTS to its checkpoint"
            )
        return cls(start_iter, evaluate=cfg.DECOUPLE.EVAL_STAGE1)

    def enter(self, trainer: LongTailTrainer, *, resumed: bool) -> None:
        if self.start_iter > 0 and self._evaluate and not resumed:
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

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, algorithm 1.
    Neither the weights nor the cut are in the model's state, so a resumed run enters the phase again; the learning
    rate comes with the checkpoint.
    """

    checkpoint = None

    def __init__(self, start_iter: int, *, lr_factor: float):
        """
        Args:
            lr_factor: multiplied to the learning rate from then on; 1: no cut.
        """
        self.start_iter = start_iter
        self._lr_factor = lr_factor

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DRWPhase:
        stage2 = stage_start(cfg, 2) if cfg.DECOUPLE.ENABLED else None
        # A run that is stage 2 alone has no SOLVER.MAX_ITER iterations.
        first_stage = cfg.SOLVER.MAX_ITER if stage2 is None else stage2 or cfg.DECOUPLE.MAX_ITER
        start = cfg.DRW.START_ITER
        start_iter = int(0.8 * first_stage) if start < 0 else start
        if cfg.DRW.LR_FACTOR <= 0:
            raise ValueError(f"DRW.LR_FACTOR must be positive (1: no cut), got {cfg.DRW.LR_FACTOR}")
        if start_iter >= total_iterations(cfg):
            raise ValueError(
                f"DRW.START_ITER is {start_iter}, but the run has {total_iterations(cfg)} iterations "
                "(SOLVER.MAX_ITER, and DECOUPLE.MAX_ITER of stage 2)"
            )
        in_stage2 = stage2 is not None and start_iter >= stage2
        key = "DECOUPLE.LOSS" if in_stage2 else "MODEL.LONG_TAIL.LOSS"
        name = cfg.DECOUPLE.LOSS if in_stage2 else cfg.MODEL.LONG_TAIL.LOSS
        if not hasattr(LOSS_REGISTRY.get(name), "set_drw"):
            able = ", ".join(sorted(n for n, loss in LOSS_REGISTRY if hasattr(loss, "set_drw")))
            raise ValueError(
                f"DRW starts at iteration {start_iter}, where {key} is {name!r}, which cannot be re-weighted; "
                f"losses that can: {able}. Set {key}, DRW.START_ITER, or DRW.ENABLED False"
            )
        return cls(start_iter, lr_factor=cfg.DRW.LR_FACTOR)

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


class PhasedRun:
    """The part of a trainer that goes through phases, for a class that sets ``seed``, ``stage`` and ``_phases``.

    Class attributes:
        phase_keys: the config keys that place the phases, for messages.
    """

    phase_keys = ""
    seed: int
    stage: int
    _phases: list[Phase]
    _entered = 0

    def enter_phases(self, iteration: int, *, resumed: bool = False) -> None:
        """Enter every phase that holds at ``iteration`` and was not entered yet.

        Args:
            iteration: of the run.
            resumed: a checkpoint from inside these phases is about to be loaded.
        """
        while self._entered < len(self._phases) and self._phases[self._entered].start_iter <= iteration:
            phase = self._phases[self._entered]
            self._entered += 1
            phase.enter(self, resumed=resumed)

    def phase_state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"seed": self.seed, "stage": self.stage, "phases": self._phases_entered()}

    def prepare_to_load(self, state_dict: dict) -> None:
        """Called with a checkpoint's trainer state before its weights are loaded: enter the phases that it was saved
        in, so that model and optimizer have their form."""
        self.enter_phases(state_dict["iteration"], resumed=True)
        remedy = (
            f"resume with the keys {self.phase_keys} of the run (config.yaml in its output folder), or start anew in "
            "another folder"
        )
        if self.stage != state_dict["stage"]:
            raise ValueError(
                f"the checkpoint was saved in stage {state_dict['stage']} but the config puts its iteration "
                f"{state_dict['iteration']} in stage {self.stage}; {remedy}"
            )
        if self._phases_entered() != state_dict.get("phases", self._phases_entered()):
            raise ValueError(
                f"at the checkpoint's iteration {state_dict['iteration']} its run was in the phases "
                f"{state_dict['phases']}, and the config puts it in {self._phases_entered()}; {remedy}"
            )
        self.seed = state_dict["seed"]

    def _phases_entered(self) -> list[str]:
        return [type(phase).__name__ for phase in self._phases[: self._entered]]

    def _describe_losses(self) -> None:
        # The stages of a cascade have losses of their own but describe them alike.
        for description in dict.fromkeys(p.loss.describe() for p in box_predictors(self.detector, required=False)):
            logger.info("Stage %d: %s", self.stage, description)


def stage_start(cfg: CfgNode, stage: int) -> int:
    """The iteration at which a stage starts: 0, the teacher of GML; 1, the detector; 2, its classifier alone."""
    if stage == 2:
        return DecouplePhase.from_config(cfg).start_iter
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
        phases.append(DecouplePhase.from_config(cfg))
    if cfg.DRW.ENABLED:
        phases.append(
            DRWPhase.from_config(cfg)
        )  # after stage 2, whose loss and schedule it changes where both start together
    return sorted(phases, key=lambda phase: phase.start_iter)


def total_iterations(cfg: CfgNode) -> int:
    """Length of the whole run, all stages together."""
    if not cfg.DECOUPLE.ENABLED:
        return cfg.TEACHER.MAX_ITER + cfg.SOLVER.MAX_ITER
    return stage_start(cfg, 2) + cfg.DECOUPLE.MAX_ITER
