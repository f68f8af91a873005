"""A dataset mapper whose instances say which annotation they are."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from .records import DatasetRecords

__all__ = ["IdentifyingMapper", "annotation_id", "build_train_mapper"]

logger = logging.getLogger(__name__)


def annotation_id(file_name: str, index: int) -> int:
    """A number in [0, 2^63) for annotation ``index`` of an image, the same in every process and run."""
    digest = hashlib.blake2b(f"{file_name}#{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class IdentifyingMapper(DatasetMapper):
    """``DatasetMapper`` whose ``instances`` have ``gt_ids`` (N,) int64: the same object has the same id each time it is
    seen, however the image is augmented."""

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        annotations = dataset_dict["annotations"]
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        ids = [annotation_id(dataset_dict["file_name"], i) for i in range(len(annotations))]
        # Detectron2 drops crowds and what a crop leaves empty. Which are left is read off the one label that it keeps.
        for i, annotation in enumerate(annotations):
            annotation["category_id"] = i
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        left = instances.gt_classes
        instances.gt_classes = classes[left]
        instances.gt_ids = torch.tensor(ids, dtype=torch.int64)[left]


def build_train_mapper(
    cfg: CfgNode, dataset_dicts: Sequence[Mapping[str, Any]], *, identify: bool = False
) -> DatasetMapper:
    """The mapper of training images that a config asks for.

    Detectron2's polygon format cannot take masks that are given as RLE. Where the training set has such masks,
    ``INPUT.MASK_FORMAT`` "polygon" becomes "bitmask", which takes both and gives the same training targets up to the
    rasterisation of polygons.

    Args:
        cfg: Detectron2's config; what ``DatasetMapper`` reads.
        dataset_dicts: the training set.
        identify: give instances their ``gt_ids``, see :class:`IdentifyingMapper`.
    """
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        records = dataset_dicts if hasattr(dataset_dicts, "has_bitmasks") else DatasetRecords([dataset_dicts])
        if records.has_bitmasks:
            logger.info("The training set has masks in RLE form: INPUT.MASK_FORMAT polygon becomes bitmask.")
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.MASK_FORMAT = "bitmask"
    return (IdentifyingMapper if identify else DatasetMapper)(cfg, is_train=True)
