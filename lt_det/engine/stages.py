"""What trains the detector in the stages of GML and BALMS, from values; both kinds of config make stages of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lt_det.data import DatasetRecords
from lt_det.data.dataset_pass import pass_over
from lt_det.gml import (
    FollowingTeacher,
    FrozenTeacher,
    MutualInformationDetector,
    Teacher,
    TrainedTeacher,
    build_mutual_information,
    fill_queues,
)
from lt_det.meta import MetaDecoupledClassifier
from lt_det.modeling import DecoupledClassifier, box_predictors

from .checkpoint import LongTailCheckpointer
from .plan import Run, Stage

__all__ = ["Classifier", "Student", "build_stage", "load_weights", "wants_keys"]


def load_weights(model: nn.Module, path: str, key: str, *, strict: bool = True) -> None:
    """Load a checkpoint's model, and nothing else of it.

    Args:
        key: the config key that names it, for messages.
        strict: refuse a checkpoint that lacks a part of the model.
    """
    LongTailCheckpointer(model, strict=strict, weights_key=key).load(path, checkpointables=[])


def wants_keys(detector: nn.Module) -> bool:
    """Whether the detector's loss learns from a teacher's keys; with all weights of them 0 it is plain L_cls."""
    return any(p.loss.wants_keys for p in box_predictors(detector, required=False))


@dataclass(frozen=True)
class Student:
    """The stage of the whole detector: by itself, or as the student of a teacher if its loss wants keys.

    Attributes:
        teacher: the kind of it.
        fresh: makes a detector as a run starts with, for the student of a teacher that the run has trained.
        output_dir: of the run, which holds ``model_teacher.pth`` then.
        images: from the run to its training set, the mapper that numbers objects, and how both are loaded (keyword
            arguments of :func:`~lt_det.gml.fill_queues`).
    """

    teacher: FollowingTeacher | FrozenTeacher | TrainedTeacher
    fresh: Callable[[], nn.Module]
    output_dir: str
    images: Callable[[Run], tuple[DatasetRecords, Callable, dict]]

    def module(self, run: Run, resumed: bool) -> nn.Module:
        """What gives the losses; ``Stage.module``."""
        detector, kind, momentum = run.detector, self.teacher, None
        if isinstance(kind, TrainedTeacher):
            teacher = Teacher(copy.deepcopy(detector))
            if resumed:
                load_weights(teacher.detector, os.path.join(self.output_dir, "model_teacher.pth"), "the teacher")
            else:
                detector.load_state_dict(self.fresh().state_dict())
        if not wants_keys(detector):
            return detector
        if isinstance(kind, FrozenTeacher):
            model = kind.model if isinstance(kind.model, nn.Module) else kind.model()
            load_weights(model, kind.weights, "TEACHER.WEIGHTS (train.teacher.weights)")
            teacher = Teacher(model.to(detector.device))
        elif isinstance(kind, FollowingTeacher):
            teacher, momentum = Teacher(copy.deepcopy(detector)), kind.momentum
        return build_mutual_information(detector, teacher, momentum=momentum)

    def begin(self, run: Run) -> None:
        """Before the first step a following teacher takes the student's weights, and the queues are filled;
        ``Stage.begin``."""
        module = run.module
        if not isinstance(module, MutualInformationDetector):
            return
        if module.momentum is not None:
            module.teacher.follow(run.detector, 0.0)
        if self.teacher.fill_queues:
            records, mapper, loading = self.images(run)
            fill_queues(module, records, mapper, seed=run.seed, **loading)


@dataclass(frozen=True)
class Classifier:
    """The stage of the classifier alone, of decoupled training.

    Attributes:
        images: from the run to its training set, its mapper, and how both are loaded (keyword arguments of
            :func:`~lt_det.data.dataset_pass.pass_over`).
    """

    images: Callable[[Run], tuple[DatasetRecords, Callable, dict]]

    def module(self, run: Run, resumed: bool) -> nn.Module:
        """What gives the losses; ``Stage.module``."""
        return DecoupledClassifier(run.detector)

    def begin(self, run: Run) -> None:
        """Let losses that ask for it see the training images before the first step; ``Stage.begin``."""
        if not any(p.loss.looks_first for p in box_predictors(run.detector)):
            return
        module = run.module

        @torch.no_grad()
        def look(inputs: list[dict], count: int) -> None:
            for rois in module.roi_batches(inputs):
                new = rois.of_first(count)  # the rest fills the batch up
                new.predictor.loss.look_first(new.predictor.classify(new.features), new.gt_classes, new.features)

        records, mapper, loading = self.images(run)
        device, description = run.detector.device, "The loss looks at the training set"
        pass_over(records, mapper, look, seed=run.seed, device=device, description=description, **loading)


def build_stage(
    number: int, bounds: tuple[int, int], of_config: Any, *, teacher, output_dir: str, evaluate: bool, meta: bool
) -> Stage:
    """The stage of a config, of either kind.

    Args:
        of_config: what the kinds of config do in their own ways. Its ``optimizer``, ``schedule`` and ``loader`` are
            those of :class:`~lt_det.engine.plan.Stage`, ``fresh`` and ``training_images`` the ``fresh`` and ``images``
            of :class:`Student`. In stage 2 ``set_loss(detector)`` exchanges the loss, ``meta_batches(run, start)`` is
            the loader of meta batches, and ``meta_step(run, **given)`` makes the step of what the run gives it.
        teacher: the kind of it, see :class:`Student`.
        evaluate: when the stage ends and another begins.
        meta: class rates are learned in stage 2.
    """
    parts: dict[str, Any] = {}
    if number == 1:
        student = Student(teacher, of_config.fresh, output_dir, of_config.training_images)
        parts = {"module": student.module, "begin": student.begin}
    elif number == 2:
        classifier = Classifier(of_config.training_images)
        parts = {"loss": of_config.set_loss, "module": classifier.module, "begin": classifier.begin}

    def with_meta_step(run: Run, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        open_batches = lambda start: iter(of_config.meta_batches(run, start))
        step = of_config.meta_step(run, optimizer=optimizer, open_batches=open_batches, seed=run.seed)
        return MetaDecoupledClassifier(run.detector, step)

    return Stage(
        number,
        *bounds,
        optimizer=of_config.optimizer,
        schedule=of_config.schedule,
        loader=of_config.loader,
        with_optimizer=with_meta_step if number == 2 and meta else None,
        evaluate=evaluate,
        **parts,
    )
