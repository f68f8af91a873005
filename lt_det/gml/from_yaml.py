"""The teacher that the keys ``TEACHER`` of a yaml config ask for."""

from __future__ import annotations

import os
from functools import partial

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from lt_det.config import get_lt_det_cfg, merge_config_file
from lt_det.losses import LOSS_REGISTRY

from .teacher import FollowingTeacher, FrozenTeacher, TrainedTeacher


def check_teacher_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for keys of ``TEACHER`` that contradict each other or the loss."""
    node, name = cfg.TEACHER, cfg.MODEL.LONG_TAIL.LOSS
    asked = [key for key in ("CONFIG", "WEIGHTS", "MAX_ITER") if node[key]]
    if asked and not _wants_keys(name):
        able = ", ".join(sorted(n for n, loss in LOSS_REGISTRY if loss.wants_keys))
        raise ValueError(
            f"TEACHER.{asked[0]} is set, but MODEL.LONG_TAIL.LOSS is {name!r}, which learns from no teacher; "
            f"set it to {able}, or unset TEACHER.{asked[0]}"
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


def teacher_from_config(cfg: CfgNode) -> FollowingTeacher | FrozenTeacher | TrainedTeacher:
    """The kind of teacher that ``TEACHER`` asks for, of the student's own config or of that in ``TEACHER.CONFIG``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its classes are not the student's.
    """
    node = cfg.TEACHER
    if node.MAX_ITER:
        return TrainedTeacher(node.MAX_ITER, evaluate=node.EVAL, fill_queues=node.FILL_QUEUES)
    if not node.WEIGHTS:
        return FollowingTeacher(node.MOMENTUM, fill_queues=node.FILL_QUEUES)
    teacher_cfg = cfg
    if node.CONFIG:
        if not os.path.isfile(node.CONFIG):
            raise FileNotFoundError(f"TEACHER.CONFIG is {node.CONFIG!r}, and there is no such file")
        teacher_cfg = get_lt_det_cfg()
        merge_config_file(teacher_cfg, node.CONFIG)
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        classes, wanted = teacher_cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if classes != wanted:
            raise ValueError(
                f"TEACHER.CONFIG {node.CONFIG} has MODEL.ROI_HEADS.NUM_CLASSES {classes}, the student has {wanted}"
            )
    return FrozenTeacher(partial(build_model, teacher_cfg), node.WEIGHTS, fill_queues=node.FILL_QUEUES)
