"""GML in the trainer: the teacher of a config, and the queues' first filling."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model

from lt_det.config import get_lt_det_cfg
from lt_det.data import IdentifyingMapper
from lt_det.losses import LOSS_REGISTRY, MutualInformation
from lt_det.modeling import MutualInformationDetector, Teacher, box_predictors

from .checkpoint import LongTailCheckpointer, check_weights_path
from .dataset_pass import pass_over

logger = logging.getLogger(__name__)


def check_teacher_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for keys of ``TEACHER`` that contradict each other or the loss."""
    node, name = cfg.TEACHER, cfg.MODEL.LONG_TAIL.LOSS
    asked = [key for key in ("CONFIG", "WEIGHTS", "MAX_ITER") if node[key]]
    if asked and not _wants_keys(name):
        able = ", ".join(sorted(n for n, loss in LOSS_REGISTRY if loss.wants_keys))
        raise ValueError(
            f"TEACHER.{asked[0]} is set, but MODEL.LONG_TAIL.LOSS is {name!r}, which learns from no teacher; set it to {able}, "
            f"or unset TEACHER.{asked[0]}"
        )
    if node.MAX_ITER < 0:
        raise ValueError(f"TEACHER.MAX_ITER must not be negative, got {node.MAX_ITER}")
    if node.MAX_ITER and len(asked) > 1:
        raise ValueError(
            f"TEACHER.MAX_ITER trains a teacher of the student's own config in this run, and TEACHER.{asked[0]} names "
            "another one; unset one of them (a teacher of another config is trained by its own run)"
        )
    if node.CONFIG and not node.WEIGHTS:
        raise ValueError("TEACHER.CONFIG needs TEACHER.WEIGHTS, the checkpoint of a detector trained with that config")
    if not 0 <= node.MOMENTUM <= 1:
        raise ValueError(f"TEACHER.MOMENTUM must lie in [0, 1], got {node.MOMENTUM}")
    if cfg.DECOUPLE.ENABLED and _wants_keys(cfg.DECOUPLE.LOSS):
        raise ValueError(
            f"DECOUPLE.LOSS is {cfg.DECOUPLE.LOSS!r}, which trains features, and stage 2 freezes them; use it as "
            "MODEL.LONG_TAIL.LOSS"
        )


def _wants_keys(loss: str) -> bool:
    return loss in LOSS_REGISTRY and LOSS_REGISTRY.get(loss).wants_keys


def wants_keys(detector: GeneralizedRCNN) -> bool:
    """Whether the detector's loss learns from a teacher's keys; with all weights of them 0 it is plain L_cls."""
    return any(p.loss.wants_keys for p in box_predictors(detector, required=False))


def load_teacher(cfg: CfgNode) -> Teacher:
    """The frozen detector in ``TEACHER.WEIGHTS``, by ``TEACHER.CONFIG`` or the student's own config.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if the weights do not fit the config, or the classes are not the student's.
    """
    teacher_cfg = cfg
    if cfg.TEACHER.CONFIG:
        check_weights_path(cfg.TEACHER.CONFIG, "TEACHER.CONFIG")
        teacher_cfg = get_lt_det_cfg()
        teacher_cfg.merge_from_file(cfg.TEACHER.CONFIG)
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        classes, wanted = teacher_cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if classes != wanted:
            raise ValueError(
                f"TEACHER.CONFIG {cfg.TEACHER.CONFIG} has MODEL.ROI_HEADS.NUM_CLASSES {classes}, the student has {wanted}"
            )
    check_weights_path(cfg.TEACHER.WEIGHTS, "TEACHER.WEIGHTS")
    detector = build_model(teacher_cfg)
    LongTailCheckpointer(detector, strict=True).load(cfg.TEACHER.WEIGHTS, checkpointables=[])
    return Teacher(detector)


def build_mutual_information(
    cfg: CfgNode, detector: GeneralizedRCNN, teacher: Teacher | None = None
) -> MutualInformationDetector:
    """What trains ``detector`` by GML.

    Args:
        teacher: frozen; by default that of ``TEACHER.WEIGHTS``, or where there is none a copy of the detector that follows it
            with ``TEACHER.MOMENTUM``.
    """
    momentum = None
    if teacher is None and cfg.TEACHER.WEIGHTS:
        teacher = load_teacher(cfg)
    elif teacher is None:
        teacher, momentum = Teacher(copy.deepcopy(detector)), cfg.TEACHER.MOMENTUM
    widths = teacher.widths
    branches = []
    for stage, predictor in enumerate(box_predictors(detector)):
        width = widths[min(stage, len(widths) - 1)]
        branches.append(MutualInformation(predictor.loss, predictor.cls_score.in_features, width))
    module = MutualInformationDetector(detector, teacher, branches, momentum=momentum).to(detector.device)
    kind = "frozen" if momentum is None else f"a copy of the student, momentum {momentum:g}"
    logger.info("GML: teacher %s; %s", kind, branches[0].describe())
    return module


def images_that_fill(records: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> list[int]:
    """Indices of images that together fill each class's queue, or hold all there is of the class.

    Rare classes choose first, so that what fills them counts for the others.

    Args:
        records: the training set in Detectron2's format.
        sizes: ``(K,)`` room for each class.
    """
    left = np.asarray(sizes).copy()
    classes = [
        [a["category_id"] for a in record.get("annotations") or () if not a.get("iscrowd", 0)] for record in records
    ]
    images: list[list[int]] = [[] for _ in left]
    for i, of_image in enumerate(classes):
        for c in set(of_image):
            images[c].append(i)
    chosen: set[int] = set()
    for c in sorted(range(len(left)), key=lambda c: len(images[c])):
        for i in images[c]:
            if left[c] <= 0:
                break
            if i not in chosen:
                chosen.add(i)
                np.subtract.at(left, classes[i], 1)
    return sorted(chosen)


def fill_queues(
    cfg: CfgNode, module: MutualInformationDetector, records: Sequence[Mapping[str, Any]], *, seed: int
) -> None:
    """Let the teacher look at training images until the queues are full or there are no more; all ranks together.

    Args:
        records: the training set in Detectron2's format.
        seed: of the augmentation.
    """
    queues = module.branches[0].queues
    chosen = images_that_fill(records, queues.sizes.tolist())

    def look(inputs: list[dict], count: int) -> None:
        module.look(inputs[:count])  # also with none left: ranks gather together

    mapper = IdentifyingMapper(cfg, is_train=True)
    pass_over(
        cfg, [records[i] for i in chosen], mapper, look, seed=seed, device=module.detector.device,
        description="Filling the queues",
    )  # fmt: skip
    logger.info(
        "GML: %d images filled %d of %d slots; %d of %d classes have a key",
        len(chosen), int(queues.filled.sum()), len(queues.keys), int((queues.filled > 0).sum()), queues.num_classes,
    )  # fmt: skip
