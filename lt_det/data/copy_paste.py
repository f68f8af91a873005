"""Copy-paste: objects of other training images, rare classes as often as frequent ones, pasted into an image."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from detectron2.structures.masks import polygons_to_bitmask
from PIL import Image

from .columns import annotation_columns
from .mapper import IdentifyingMapper, annotation_id
from .pixels import read_image

__all__ = ["CopyPaste", "CopyPasteMapper"]

# Smaller objects, in pixels of their own image, are not worth pasting.
_LEAST_SIDE = 4.0
# Draws of an object until one can be pasted.
_TRIES = 5


class CopyPaste:
    """Pastes objects of a training set into its images, before any other augmentation.

    Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021.
    There a random subset of a random image's objects is pasted. Here each pasted object is drawn for itself: first its
    class, with a probability that falls with the class's number of instances, then one of the class's objects. It is
    flipped at random, scaled, and put anywhere where all of it is in the image, without blending at its outline (which
    the paper finds to make no difference).

    What is under a pasted object is cut out of the masks and boxes of the objects there; an object of which too little
    is left is dropped. LVIS's federated fields stay true: a pasted class is no longer a verified negative, and unless
    its absence or its instances had been verified, the image is not exhaustively annotated with it.
    """

    def __init__(
        self,
        dataset_dicts: Sequence[Mapping[str, Any]],
        *,
        probability: float = 0.5,
        num_objects: int = 2,
        class_power: float = 1.0,
        scale: tuple[float, float] = (0.5, 1.5),
        min_visible: float = 0.1,
        category_ids: Mapping[int, int] | None = None,
    ):
        """
        Args:
            dataset_dicts: the training set in Detectron2's format, where pasted objects come from.
            probability: share of the images that something is pasted into.
            num_objects: objects pasted into such an image.
            class_power: a class is drawn in proportion to (its instances) ** (1 - class_power): 1 draws all classes
                alike, 0 as often as they are.
            scale: smallest and largest factor on an object's size, drawn log-uniformly.
            min_visible: an object of which a smaller share of the mask is left is dropped.
            category_ids: class index to the category id that the federated fields have; by default index + 1, as in
                LVIS.

        Raises:
            ValueError: for options out of range, or a data set without objects.
        """
        if not 0 <= probability <= 1 or not 0 <= min_visible <= 1:
            raise ValueError(
                f"INPUT.COPY_PASTE.PROB ({probability}) and MIN_VISIBLE ({min_visible}) must be in [0, 1]."
            )
        if num_objects < 1 or not 0 < scale[0] <= scale[1]:
            raise ValueError(
                f"INPUT.COPY_PASTE.NUM_OBJECTS ({num_objects}) must be at least 1, and SCALE {tuple(scale)} two "
                "ascending positive numbers."
            )
        image, category, crowd, num_images = annotation_columns(dataset_dicts)
        first = np.searchsorted(image, np.arange(num_images))
        rows = np.flatnonzero(~crowd)
        if not rows.size:
            raise ValueError("INPUT.COPY_PASTE.ENABLED: the training set has no objects to paste.")
        rows = rows[np.argsort(category[rows], kind="stable")]
        self._image = image[rows].astype(np.int32)
        self._index = (rows - first[image[rows]]).astype(np.int32)  # within the image's annotations
        counts = np.bincount(category[rows])
        self._ends = np.cumsum(counts)
        weights = np.zeros(len(counts))
        weights[counts > 0] = counts[counts > 0] ** (1.0 - class_power)
        self._total = np.cumsum(weights / weights.sum())
        self._records = dataset_dicts
        self._probability, self._num_objects, self._scale = probability, num_objects, tuple(scale)
        self._min_visible, self._category_ids = min_visible, category_ids

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_dicts: Sequence[Mapping[str, Any]]) -> CopyPaste:
        """By ``INPUT.COPY_PASTE`` and the metadata of ``DATASETS.TRAIN``."""
        options = cfg.INPUT.COPY_PASTE
        ids = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_dataset_id_to_contiguous_id")
        return cls(
            dataset_dicts,
            probability=options.PROB,
            num_objects=options.NUM_OBJECTS,
            class_power=options.CLASS_POWER,
            scale=options.SCALE,
            min_visible=options.MIN_VISIBLE,
            category_ids=None if ids is None else {i: c for c, i in ids.items()},
        )

    def draw(self) -> tuple[int, int]:
        """A class by its weight, then one of its objects: (image, position among its annotations)."""
        c = int(np.searchsorted(self._total, np.random.random(), side="right"))
        c = min(c, len(self._total) - 1)
        start = int(self._ends[c - 1]) if c else 0
        row = np.random.randint(start, int(self._ends[c]))
        return int(self._image[row]), int(self._index[row])

    def __call__(self, image: np.ndarray, record: dict, image_format: str) -> np.ndarray:
        """Paste into an image and its record, which are changed.

        Draws from ``numpy.random``.

        Args:
            image: (H, W, C) uint8, as ``read_image`` gives it.
            record: its dataset dict; its boxes are in ``XYWH_ABS`` or ``XYXY_ABS``.
            image_format: ``INPUT.FORMAT``.
        """
        if np.random.random() >= self._probability:
            return image
        image = np.array(image)
        annotated = {obj["category_id"] for obj in record["annotations"]}  # what is covered later, too
        for _ in range(self._num_objects):
            for _ in range(_TRIES):
                if self._paste_one(image, record, image_format, annotated):
                    break
        return image

    def _paste_one(self, image: np.ndarray, record: dict, image_format: str, annotated: set[int]) -> bool:
        height, width = image.shape[:2]
        position, index = self.draw()
        source = self._records[position]
        obj = source["annotations"][index]
        if not obj.get("segmentation"):
            return False
        x0, y0, x1, y1 = BoxMode.convert(obj["bbox"], obj["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0 = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
        x1, y1 = min(source["width"], int(np.ceil(x1))), min(source["height"], int(np.ceil(y1)))
        if x1 - x0 < _LEAST_SIDE or y1 - y0 < _LEAST_SIDE:
            return False
        scale = np.exp(np.random.uniform(*np.log(self._scale)))
        scale = min(scale, width / (x1 - x0), height / (y1 - y0))
        w, h = max(1, int((x1 - x0) * scale)), max(1, int((y1 - y0) * scale))
        flip = np.random.random() < 0.5
        left, top = np.random.randint(0, width - w + 1), np.random.randint(0, height - h + 1)

        pixels = read_image(source["file_name"], image_format)
        utils.check_image_size(source, pixels)
        pixels = _resized(pixels[y0:y1, x0:x1], (w, h), flip)
        mask, segmentation = _moved_mask(obj["segmentation"], (x0, y0, x1, y1), (w, h), flip, (left, top), image.shape)
        if not mask.any():
            return False
        self._cut(record, mask, left, top)
        image[top : top + h, left : left + w][mask] = pixels[mask]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        pasted = {
            **{k: v for k, v in obj.items() if k not in ("segmentation", "bbox", "bbox_mode", "keypoints")},
            "bbox": [
                float(left + columns[0]), float(top + rows[0]), float(left + columns[-1] + 1), float(top + rows[-1] + 1)
            ],
            "bbox_mode": BoxMode.XYXY_ABS,
            "segmentation": segmentation,
            "gt_id": annotation_id(source["file_name"], index),
        }  # fmt: skip
        self._update_federated(record, obj["category_id"], annotated)
        record["annotations"].append(pasted)
        return True

    def _cut(self, record: dict, mask: np.ndarray, left: int, top: int) -> None:
        """Take the pasted ``mask``, whose corner is at (left, top), away from the objects that are there."""
        height, width = record["height"], record["width"]
        h, w = mask.shape
        kept = []
        for obj in record["annotations"]:
            x0, y0, x1, y1 = BoxMode.convert(obj["bbox"], obj["bbox_mode"], BoxMode.XYXY_ABS)
            if obj.get("iscrowd", 0) or x1 <= left or y1 <= top or x0 >= left + w or y0 >= top + h:
                kept.append(obj)
                continue
            segmentation = obj.get("segmentation")
            if segmentation:
                visible = _bitmask(segmentation, height, width)
            else:  # boxes alone: what is left of the box
                visible = np.zeros((height, width), dtype=bool)
                visible[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = True
            before = np.count_nonzero(visible)
            visible[top : top + h, left : left + w] &= ~mask
            after = np.count_nonzero(visible)
            if after == before:
                kept.append(obj)
                continue
            if after == 0 or after < self._min_visible * before:
                continue
            rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
            # The box shrinks to what is left, and keeps its sides where nothing was cut off.
            box = [max(x0, columns[0]), max(y0, rows[0]), min(x1, columns[-1] + 1), min(y1, rows[-1] + 1)]
            obj = {**obj, "bbox": [float(v) for v in box], "bbox_mode": BoxMode.XYXY_ABS}
            if segmentation:
                obj["segmentation"] = mask_util.encode(np.asfortranarray(visible.astype(np.uint8)))
            kept.append(obj)
        record["annotations"] = kept

    def _update_federated(self, record: dict, pasted_class: int, annotated: set[int]) -> None:
        """``annotated``: classes of the image whose instances have been looked for, one way or the other."""
        if "neg_category_ids" not in record:
            return
        category = pasted_class + 1 if self._category_ids is None else self._category_ids[pasted_class]
        negative, incomplete = record["neg_category_ids"], record["not_exhaustive_category_ids"]
        if category not in negative and pasted_class not in annotated and category not in incomplete:
            record["not_exhaustive_category_ids"] = [*incomplete, category]
        record["neg_category_ids"] = [c for c in negative if c != category]
        annotated.add(pasted_class)


def _bitmask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        return polygons_to_bitmask([np.asarray(p, dtype=np.float64) for p in segmentation], height, width)
    return mask_util.decode(segmentation).astype(bool)


def _resized(pixels: np.ndarray, size: tuple[int, int], flip: bool) -> np.ndarray:
    if pixels.shape[2] == 1:
        pixels = np.asarray(Image.fromarray(pixels[:, :, 0]).resize(size, Image.Resampling.BILINEAR))[:, :, None]
    else:
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if flip else pixels


def _moved_mask(
    segmentation: list | dict,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    flip: bool,
    corner: tuple[int, int],
    shape: Sequence[int],
) -> tuple[np.ndarray, list | dict]:
    """The part of a mask in ``box`` brought to ``size``: (h, w) bool, and the mask in an image of ``shape`` with the
    box's corner at ``corner``, in the form that it had."""
    (x0, y0, x1, y1), (w, h) = box, size
    if isinstance(segmentation, list):
        moved = []
        for polygon in segmentation:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
            points = (points - (x0, y0)) * (w / (x1 - x0), h / (y1 - y0))
            points = points.clip(0, (w, h))
            moved.append(np.stack([w - points[:, 0], points[:, 1]], 1) if flip else points)
        mask = polygons_to_bitmask([p.reshape(-1) for p in moved], h, w)
        return mask, [(p + corner).reshape(-1).tolist() for p in moved]
    mask = mask_util.decode(segmentation)[y0:y1, x0:x1]
    mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)).astype(bool)
    mask = mask[:, ::-1] if flip else mask
    whole = np.zeros(shape[:2], dtype=np.uint8, order="F")
    whole[corner[1] : corner[1] + h, corner[0] : corner[0] + w] = mask
    return mask, mask_util.encode(whole)


def _refuse_others(wanted: Any) -> None:
    if wanted:
        raise ValueError("INPUT.COPY_PASTE.ENABLED does not work with MODEL.KEYPOINT_ON or MODEL.LOAD_PROPOSALS.")


class CopyPasteMapper(IdentifyingMapper):
    """``DatasetMapper`` that pastes objects into an image before it is augmented; see :class:`CopyPaste`.

    The masks of an image where an object was cut are bitmasks, since what is left need not be polygons; those of others
    are as ``INPUT.MASK_FORMAT`` says (a batch may hold both). Instances have ``gt_ids``; a pasted object has that of
    the object that it is a copy of. Semantic segmentation, proposals and keypoints are not supported.
    """

    @configurable
    def __init__(self, is_train: bool, *, copy_paste: CopyPaste, **mapper: Any):
        """
        Args:
            is_train: True.
            copy_paste: what is pasted.
            mapper: arguments of Detectron2's ``DatasetMapper``.
        """
        super().__init__(is_train, **mapper)
        self._mask_format = self.instance_mask_format
        _refuse_others(self.use_keypoint or self.proposal_topk)
        self.copy_paste = copy_paste

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool, dataset_dicts: Sequence[Mapping[str, Any]]) -> dict:
        _refuse_others(cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS)
        return {**super().from_config(cfg, is_train), "copy_paste": CopyPaste.from_config(cfg, dataset_dicts)}

    def __call__(self, dataset_dict: dict) -> dict:
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        for i, annotation in enumerate(record["annotations"]):
            annotation["gt_id"] = annotation_id(record["file_name"], i)
        image = self.copy_paste(image, record, self.image_format)
        polygons = all(isinstance(a.get("segmentation", []), list) for a in record["annotations"])
        self.instance_mask_format = self._mask_format if polygons else "bitmask"
        return self._augmented(record, image)
