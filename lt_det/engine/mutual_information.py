"""GML in the trainer: the teacher of a config, and the queues' first filling."""

from __future__ import annotations

import copy
import logging

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model

from lt_det.config import get_lt_det_cfg
from lt_det.data import DatasetRecords, build_train_mapper, images_that_fill
from lt_det.gml import MutualInformation, MutualInformationDetector, Teacher
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import box_predictors

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
            f"TEACHER.{asked[0]} is set, but MODEL.LONG_TAIL.LOSS is {name!r}, which learns from no teacher; "
            f"set it to {able}, "
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
                f"TEACHER.CONFIG {cfg.TEACHER.CONFIG} has MODEL.ROI_HEADS.NUM_CLASSES {classes}, the student "
                f"has {wanted}"
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
        teacher: frozen; by default that of ``TEACHER.WEIGHTS``, or where there is none a copy of the detector that
        follows it
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


def fill_queues(cfg: CfgNode, module: MutualInformationDetector, records: DatasetRecords, *, seed: int) -> None:
    """Let the teacher look at training images until the queues are full or there are no more; all ranks together.

    Args:
        records: the training set in Detectron2's format.
        seed: of the augmentation.
    """
    queues = module.branches[0].queues
    chosen = images_that_fill(records, queues.sizes.tolist())

    def look(inputs: list[dict], count: int) -> None:
        module.look(inputs[:count])  # also with none left: ranks gather together

    mapper = build_train_mapper(cfg, records, identify=True)
    pass_over(
        cfg, records.select(chosen), mapper, look, seed=seed, device=module.detector.device,
        description="Filling the queues",
    )  # fmt: skip
    logger.info(
        "GML: %d images filled %d of %d slots; %d of %d classes have a key",
        len(chosen), int(queues.filled.sum()), len(queues.keys), int((queues.filled > 0).sum()), queues.num_classes,
    )  # fmt: skip
