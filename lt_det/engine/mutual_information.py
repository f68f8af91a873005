"""GML in the trainer: the teacher of a config, and the queues' first filling."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils import comm
from tqdm import tqdm

from lt_det.config import add_lt_det_config
from lt_det.data import IdentifyingMapper, InOrderSampler, build_train_loader
from lt_det.losses import LOSS_REGISTRY, MutualInformation
from lt_det.modeling import MutualInformationDetector, Teacher, box_predictors

from .checkpoint import LongTailCheckpointer, check_weights_path

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
    """Whether the detector's loss learns from a teacher's keys at all; with all weights of them 0 it is plain L_cls."""
    losses = [p.loss for p in box_predictors(detector, required=False)]
    return any(loss.wants_keys and (loss.beta > 0 or loss.alpha > 0) for loss in losses)


def load_teacher(cfg: CfgNode) -> Teacher:
    """The frozen detector in ``TEACHER.WEIGHTS``, by ``TEACHER.CONFIG`` or the student's own config.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if the weights do not fit the config, or the classes are not the student's.
    """
    teacher_cfg = cfg
    if cfg.TEACHER.CONFIG:
        check_weights_path(cfg.TEACHER.CONFIG, "TEACHER.CONFIG")
        teacher_cfg = get_cfg()
        add_lt_det_config(teacher_cfg)
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
        teacher, momentum = copy_as_teacher(detector), cfg.TEACHER.MOMENTUM
    widths = teacher.widths
    branches = []
    for stage, predictor in enumerate(box_predictors(detector)):
        width = widths[min(stage, len(widths) - 1)]
        branches.append(MutualInformation(predictor.loss, predictor.cls_score.in_features, width))
    module = MutualInformationDetector(detector, teacher, branches, momentum=momentum).to(detector.device)
    kind = "frozen" if momentum is None else f"a copy of the student, momentum {momentum:g}"
    megabytes = sum(branch.queues.megabytes for branch in branches)
    logger.info("GML: teacher %s; queues of %.1f MB", kind, megabytes)
    return module


def copy_as_teacher(detector: GeneralizedRCNN) -> Teacher:
    """A teacher with the detector's present weights."""
    for predictor in box_predictors(detector):
        predictor.roi_observer = None  # it would be copied with all that it holds
    return Teacher(copy.deepcopy(detector))


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
    chosen = images_that_fill(records, module.branches[0].queues.sizes.tolist())
    batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    sampler = InOrderSampler(len(chosen), batch_size)
    loader = build_train_loader(
        [records[i] for i in chosen],
        IdentifyingMapper(cfg, is_train=True),
        sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
    )
    device = module.detector.device
    left = sampler.count
    progress = tqdm(
        total=sampler.count, unit="image", desc="Filling the queues", disable=not comm.is_main_process()
    )
    # Nothing here may move the training run's random numbers.
    with progress, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for inputs in loader:
            count = min(left, len(inputs))
            with torch.autocast(device.type, enabled=cfg.SOLVER.AMP.ENABLED and device.type == "cuda"):
                module.look(inputs[:count])  # also with none left: ranks gather together
            left -= count
            progress.update(count)
    filled = module.branches[0].queues.filled
    logger.info(
        "GML: %d images filled %d of %d slots; %d of %d classes have a key",
        len(chosen), int(filled.sum()), len(module.branches[0].queues.keys), int((filled > 0).sum()), len(filled),
    )  # fmt: skip


def mapper_with_ids(cfg: CfgNode) -> DatasetMapper:
    """The training mapper, with what GML needs to tell objects apart."""
    return IdentifyingMapper(cfg, is_train=True)
