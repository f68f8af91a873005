"""The one trainer: it runs a plan, and resumes it from any checkpoint to the losses of an uninterrupted run."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Mapping

import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lt_det.gml import MutualInformationDetector
from lt_det.meta import MetaStep
from lt_det.modeling import box_predictors
from lt_det.modeling.calibrators import moments_path

from .checkpoint import LongTailCheckpointer
from .hooks import IterationSeed, LoaderStateHook, MetaHook, PhaseHook, StageCheckpointer, StageLRScheduler
from .hooks_selection import EarlyStop
from .logit_moments import refit_calibrators
from .logs import build_writers
from .plan import Change, Plan, Stage
from .steps import BFloat16Trainer, in_channels_last

logger = logging.getLogger(__name__)

# Of the beginning of a stage after the first: its name in checkpoints, the name under which the model that it begins
# from is kept, and what the log says.
_BEGINNINGS = {
    1: ("StudentPhase", "model_teacher", "the teacher is trained, the student begins"),
    2: ("DecouplePhase", "model_stage1", "stage 2 begins, the classifier alone is trained"),
}


class Trainer(TrainerBase):
    """Runs a :class:`~lt_det.engine.plan.Plan`.

    The order and the augmentation of the images follow from the seed and the iteration, and so does everything else
    that is drawn at random. A checkpoint holds the rest: weights, optimizer, schedule, which stage and changes the run
    is in, and what its module keeps beside the detector (rates of a meta step, queues of GML).

    Attributes:
        plan: what is run.
        detector: the model itself, whatever wraps it for training in the present stage.
        stage: number of the present stage: 1 or 2; 0 while the run trains the teacher of its own student.
        seed: of the whole run, the same on all ranks; kept in the checkpoint.
        scheduler: of the learning rate in the present stage.
    """

    def __init__(self, plan: Plan):
        TrainerBase.__init__(self)
        self.plan = plan
        self.seed = plan.seed
        self.max_iter = plan.max_iter
        self.detector = plan.model()
        self._changes = self._in_order()
        self._entered = 0
        # Where the loader of a sampler that cannot be replayed stood at the checkpoint; set by LoaderStateHook.
        self.loader_state: Mapping | None = None
        self.build_stage(plan.stages[0].number)
        self.checkpointer = LongTailCheckpointer(
            self.detector,
            plan.output_dir,
            # Training on top of a finished model: all of it must fit.
            strict=plan.stages[-1].number == 2 and plan.stages[-1].start_iter == 0,
            weights_key=plan.weights_key,
            trainer=weakref.proxy(self),
            run=plan.record,
        )
        self.register_hooks(self.build_hooks())

    def _in_order(self) -> list[Change]:
        """What changes in the run: the beginnings of its stages, then its other changes, by iteration."""
        changes = []
        for before, stage in zip(self.plan.stages, self.plan.stages[1:]):
            name, keeps, _ = _BEGINNINGS[stage.number]

            def enter(run: Trainer, resumed: bool, before: Stage = before, stage: Stage = stage) -> None:
                run.begin_stage(before, stage, resumed=resumed)

            changes.append(Change(name, stage.start_iter, enter, keeps))
        return sorted([*changes, *self.plan.changes], key=lambda change: change.start_iter)

    # ---- stages and changes

    def begin_stage(self, before: Stage, stage: Stage, *, resumed: bool) -> None:
        """Go over from one stage to the next.

        Args:
            resumed: a checkpoint from inside the next one is about to be loaded.
        """
        if before.length and before.evaluate and not resumed:
            self.evaluate_stage(before.number)
        logger.info("Iteration %d: %s", stage.start_iter, _BEGINNINGS[stage.number][2])
        self.build_stage(stage.number, resumed=resumed)
        self._describe_losses()
        if not resumed:
            # The printer shows every loss it has a history of, also those that are no longer computed.
            for known in (self.storage.histories(), self.storage.latest()):
                for name in [name for name in known if "loss" in name]:
                    del known[name]

    def build_stage(self, number: int, *, resumed: bool = False) -> None:
        """Build what a training stage needs around the detector: the module that gives the losses, its optimizer and
        its schedule. The loader is built by the first step that wants a batch: a resumed run skips straight to its own.
        """
        stage = self.plan.stage(number)
        self.stage = number
        run = weakref.proxy(self)  # what a module keeps of it must not keep it alive
        for predictor in box_predictors(self.detector, required=False):
            predictor.roi_observer = None  # of an earlier stage
        if stage.loss is not None:
            stage.loss(self.detector)
        module = stage.module(run, resumed)
        optimizer = stage.optimizer(module)
        if stage.with_optimizer is not None:
            module = stage.with_optimizer(run, module, optimizer)
        on_gpu = next(self.detector.parameters()).is_cuda
        step = SimpleTrainer if not self.plan.amp else AMPTrainer if on_gpu else BFloat16Trainer
        if step is BFloat16Trainer:
            in_channels_last(module)
        wrapped = create_ddp_model(module, **self.plan.ddp, **({} if on_gpu else {"device_ids": None}))
        self._trainer = step(wrapped, None, optimizer)
        self.scheduler = stage.schedule(optimizer)

    def enter_phases(self, iteration: int, *, resumed: bool = False) -> None:
        """Enter every stage and change that holds at ``iteration`` and was not entered yet.

        Args:
            iteration: of the run.
            resumed: a checkpoint from inside them is about to be loaded.
        """
        while self._entered < len(self._changes) and self._changes[self._entered].start_iter <= iteration:
            change = self._changes[self._entered]
            self._entered += 1
            change.enter(self, resumed)
        stage = self.plan.stage(self.stage)
        if stage.begin is not None and iteration == stage.start_iter and not resumed:
            stage.begin(self)

    def evaluate_stage(self, number: int) -> None:
        """Evaluate at the end of a stage: results in the folder ``inference_stage<n>`` and in the training's
        metrics."""
        refit_calibrators(self.plan.images, self.detector)
        results = self.plan.evaluate(self.detector, f"inference_stage{number}")
        for name, value in flatten_results_dict(results or {}).items():
            self.storage.put_scalar(f"stage{number}/{name}", value, smoothing_hint=False)

    def _describe_losses(self) -> None:
        # The stages of a cascade have losses of their own but describe them alike.
        for description in dict.fromkeys(p.loss.describe() for p in box_predictors(self.detector, required=False)):
            logger.info("Stage %d: %s", self.stage, description)

    # ---- what the present stage has

    @property
    def model(self) -> nn.Module:
        """What gives the losses in the present stage, wrapped for distributed training."""
        return self._trainer.model

    @property
    def module(self) -> nn.Module:
        """What gives the losses in the present stage."""
        model = self._trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trainer.optimizer

    @property
    def meta(self) -> MetaStep | None:
        """The meta step of stage 2, if it has one."""
        return getattr(self.module, "meta", None)

    @property
    def mutual_information(self) -> MutualInformationDetector | None:
        """What trains the detector by GML in stage 1, if it does."""
        return self.module if isinstance(self.module, MutualInformationDetector) else None

    @property
    def data_loader(self) -> Iterable | None:
        """The train loader of the present stage; None before its first step."""
        return self._trainer.data_loader

    @property
    def train_loader(self) -> Iterable:
        """The train loader of the present stage, built if it is not there yet."""
        if self._trainer.data_loader is None:
            self._trainer.reset_data_loader(self._build_loader)
        return self._trainer.data_loader

    def _build_loader(self) -> Iterable:
        stage = self.plan.stage(self.stage)
        loader = stage.loader(self)
        done = max(self.iter, self.start_iter) - stage.start_iter
        if done > 0 and hasattr(loader, "load_state_dict"):
            by_replay = getattr(getattr(loader, "sampler", None), "resumable_by_replay", True)
            loader.load_state_dict({"iteration": done} if by_replay else self.loader_state)
        return loader

    # ---- the run

    def build_hooks(self) -> list[HookBase]:
        plan, main = self.plan, comm.is_main_process()
        more = plan.hooks(self)
        ret = [
            IterationSeed(),
            PhaseHook(),
            hooks.IterationTimer(),
            StageLRScheduler(),
            MetaHook(plan.output_dir, plan.statistics),
            LoaderStateHook(plan.checkpoints["period"]),
            *more.before_saving,
        ]
        if main:
            ret.append(hooks.PeriodicCheckpointer(self.checkpointer, **plan.checkpoints))
            ret.append(StageCheckpointer({c.start_iter - 1: c.keeps for c in self._changes if c.keeps}))
        # After the checkpointer, so that a failing evaluation loses nothing.
        ret.append(hooks.EvalHook(plan.eval_period, self._evaluate))
        ret += more.after_evaluation
        if main:
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=plan.log_period))
        return ret

    def build_writers(self) -> list:
        return build_writers(self.plan.output_dir, self.max_iter)

    def _evaluate(self) -> Mapping | None:
        if any(stage.evaluate and self.iter + 1 == stage.end_iter < self.max_iter for stage in self.plan.stages):
            return None  # evaluate_stage is next, of the same model
        last = self.iter + 1 >= self.max_iter
        path = moments_path(os.path.join(self.plan.output_dir, "model_final.pth")) if last else ""
        refit_calibrators(self.plan.images, self.detector, path)
        self._last_eval_results = self.plan.evaluate(self.detector, "")
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the weights that the plan starts from or, with ``resume``, the last checkpoint of its output folder."""
        self.checkpointer.resume_or_load(self.plan.weights, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self, start_iter: int | None = None, max_iter: int | None = None) -> Mapping | None:
        """Run all stages. Returns the results of the last evaluation on the main process.

        Args:
            start_iter, max_iter: the part of the run to train; by default from where it stands to its end.
        """
        self._describe_losses()
        start = self.start_iter if start_iter is None else start_iter
        try:
            TrainerBase.train(self, start, self.max_iter if max_iter is None else max_iter)
        except EarlyStop:
            pass  # it has said so, and kept the model
        return getattr(self, "_last_eval_results", None)

    def run_step(self) -> None:
        _ = self.train_loader
        self._trainer.iter = self.iter
        self._trainer.run_step()
        if self.mutual_information is not None:
            self.mutual_information.update_teacher()

    # ---- checkpoints

    def state_dict(self) -> dict:
        state = {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "seed": self.seed,
            "stage": self.stage,
            "phases": self._phases_entered(),
        }
        name = getattr(self.module, "state_name", None)
        if name is not None:
            state[name] = self.module.training_state()
        return state

    def load_state_dict(self, state_dict: Mapping) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        name = getattr(self.module, "state_name", None)
        if name is not None:
            self.module.load_training_state(state_dict[name])

    def prepare_to_load(self, state_dict: Mapping) -> None:
        """Called with a checkpoint's trainer state before its weights are loaded: enter the stages and changes that it
        was saved in, so that model and optimizer have their form."""
        self.seed = state_dict["seed"]
        iteration = state_dict["iteration"]
        self.enter_phases(iteration, resumed=True)
        remedy = (
            f"resume with the keys {self.plan.phase_keys} of the run (config.yaml in its output folder), or start anew "
            "in another folder"
        )
        if self.stage != state_dict["stage"]:
            raise ValueError(
                f"the checkpoint was saved in stage {state_dict['stage']} but the config puts its iteration "
                f"{iteration} in stage {self.stage}; {remedy}"
            )
        if self._phases_entered() != state_dict.get("phases", self._phases_entered()):
            raise ValueError(
                f"at the checkpoint's iteration {iteration} its run was in the phases {state_dict['phases']}, and the "
                f"config puts it in {self._phases_entered()}; {remedy}"
            )

    def _phases_entered(self) -> list[str]:
        return [change.name for change in self._changes[: self._entered]]
