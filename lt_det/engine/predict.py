"""Predictions of images that belong to no data set, by any checkpoint that Detectron2 can load."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torchvision.ops import nms

import lt_det.modeling  # noqa: F401  # registers the heads
from lt_det.data import ClassStatistics, group_letters, register_builtin

from .checkpoint import LongTailCheckpointer
from .from_yaml import LongTailTrainer

__all__ = ["Predictor", "inference_config", "keep_instances", "kept"]

logger = logging.getLogger(__name__)


def inference_config(cfg: CfgNode) -> CfgNode:
    """A config whose plain ``build_model``, as in Detectron2's ``DefaultPredictor``, gives the model as its last stage
    left it: without stage 2, whose loss (and so the activation of scores) becomes the model's.

    ``MODEL.DEVICE`` becomes "cpu" where there is no GPU.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.DECOUPLE.ENABLED:
        cfg.MODEL.LONG_TAIL.LOSS = cfg.DECOUPLE.LOSS
        cfg.MODEL.LONG_TAIL.PRIOR = cfg.DECOUPLE.PRIOR or cfg.MODEL.LONG_TAIL.PRIOR
        cfg.MODEL.LONG_TAIL.BACKGROUND = cfg.DECOUPLE.BACKGROUND or cfg.MODEL.LONG_TAIL.BACKGROUND
        cfg.DECOUPLE.ENABLED = False
        cfg.META.NAME = ""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


@dataclass
class Predictor:
    """A trained model with what it is to know of its classes.

    Attributes:
        model: on its device, in evaluation mode.
        names: of the K classes.
        groups: K letters of "r", "c", "f"; "" where the training counts are not known.
        category_ids: K ids that results name the classes by.
    """

    model: torch.nn.Module
    names: list[str]
    groups: list[str]
    category_ids: list[int]
    resize: T.Augmentation
    bgr: bool

    @classmethod
    def from_config(cls, cfg: CfgNode, *, statistics: ClassStatistics | None = None) -> Predictor:
        """Build the model of a config, load ``MODEL.WEIGHTS``, and find the names of its classes: in the checkpoint,
        which lt_det's have; else those of ``DATASETS.TRAIN`` or ``DATASETS.TEST`` as Detectron2 knows them without
        reading annotations; else "class 1", "class 2", and so on.

        Args:
            cfg: a config with lt_det's keys.
            statistics: of the training set, for the groups; by default those that ``MODEL.LONG_TAIL.STATISTICS`` or the
                training set's metadata give, where there are any.

        Raises:
            ValueError: the weights do not fit, or there are others than ``NUM_CLASSES`` names.
        """
        cfg = inference_config(cfg)
        model = LongTailTrainer.build_trained_model(cfg).eval()
        checkpointer = LongTailCheckpointer(model, strict=True)
        extra = checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        register_builtin()
        names = (extra.get("run") or {}).get("thing_classes") or _known(cfg, "thing_classes")
        if names is None:
            logger.warning("Neither the checkpoint nor its data set is known to name the classes; they get numbers")
            names = [f"class {i + 1}" for i in range(number)]
        if len(names) != number:
            raise ValueError(
                f"{cfg.MODEL.WEIGHTS} names {len(names)} classes and MODEL.ROI_HEADS.NUM_CLASSES is {number}; use the "
                "config that it was trained with (config.yaml beside it)."
            )
        groups = _groups(cfg, statistics, number)
        ids = _known(cfg, "thing_dataset_id_to_contiguous_id") or {i + 1: i for i in range(number)}
        by_class = {contiguous: dataset for dataset, contiguous in ids.items()}
        resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        return cls(
            model, list(names), groups, [by_class.get(i, i + 1) for i in range(number)], resize,
            cfg.INPUT.FORMAT == "BGR",
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """
        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            The predicted instances on the CPU, best first, in pixels of the image.
        """
        height, width = image.shape[:2]
        pixels = image[:, :, ::-1] if self.bgr else image
        pixels = self.resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)))
        outputs = self.model([{"image": tensor, "height": height, "width": width}])
        if "instances" not in outputs[0]:
            raise ValueError(f"the model gives {sorted(outputs[0])} and no instances; predict needs a detector.")
        found = outputs[0]["instances"].to("cpu")
        return found[found.scores.argsort(descending=True, stable=True)]

    def thresholds(self, default: float, by_name: Mapping[str, float]) -> np.ndarray:
        """(K,) thresholds: those by name, ``default`` for classes without.

        Raises:
            ValueError: none of the names is one of the model's.
        """
        if by_name and not set(by_name) & set(self.names):
            raise ValueError(
                f"no name in the thresholds is one of the model's classes; the first are {list(by_name)[:3]} there and "
                f"{self.names[:3]} here."
            )
        return np.array([by_name.get(name, default) for name in self.names])


def kept(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, thresholds: Sequence[float] | np.ndarray,
    nms_iou: float,
) -> torch.Tensor:  # fmt: skip
    """Which detections are worth looking at, best first.

    Args:
        boxes: (N, 4) x1, y1, x2, y2; scores (N,); classes (N,) int64.
        thresholds: (K,) smallest score of each class.
        nms_iou: of detections of whatever classes whose boxes overlap by more, the best is kept; 1: all are.

    Returns:
        Indices, int64.
    """
    above = torch.nonzero(scores >= torch.as_tensor(thresholds, dtype=scores.dtype)[classes])[:, 0]
    above = above[scores[above].argsort(descending=True, stable=True)]
    return above if nms_iou >= 1 else above[nms(boxes[above], scores[above], nms_iou)]


def keep_instances(found: Instances, thresholds: Sequence[float] | np.ndarray, nms_iou: float) -> Instances:
    """:func:`kept` of predicted instances."""
    return found[kept(found.pred_boxes.tensor, found.scores, found.pred_classes, thresholds, nms_iou)]


def _known(cfg: CfgNode, field: str):
    """What Detectron2's catalog has of the config's data sets already; nothing is read for it."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        value = MetadataCatalog.get(name).get(field) if name in MetadataCatalog.list() else None
        if value is not None:
            return value
    return None


def _groups(cfg: CfgNode, statistics: ClassStatistics | None, number: int) -> list[str]:
    if statistics is None and cfg.MODEL.LONG_TAIL.STATISTICS:
        statistics = ClassStatistics.read(cfg.MODEL.LONG_TAIL.STATISTICS)
    if statistics is None:
        for name in cfg.DATASETS.TRAIN:
            metadata = MetadataCatalog.get(name)
            try:
                # What stands in the metadata (LVIS) costs nothing; annotations of LVIS's size take a while to count.
                counts = metadata.get("class_image_count")
                statistics = (
                    ClassStatistics.from_category_info(counts) if counts else ClassStatistics.from_metadata(metadata)
                )
                break
            except (ValueError, OSError):
                continue
    if statistics is None or statistics.num_classes != number:
        return [""] * number
    return group_letters(statistics.frequency_groups, number).tolist()
