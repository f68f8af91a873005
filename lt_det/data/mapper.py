"""The mapper of training images, and one whose instances say which annotation they are."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from .pixels import FastResize, read_image

__all__ = ["IdentifyingMapper", "TrainMapper", "annotation_id"]


def _copied(annotation: dict) -> dict:
    """A copy of its own; polygons as the arrays that augmentation makes of them."""
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list):
        return copy.deepcopy(annotation)
    copied = copy.deepcopy({key: value for key, value in annotation.items() if key != "segmentation"})
    copied["segmentation"] = [np.array(polygon) for polygon in polygons]
    return copied


class TrainMapper(DatasetMapper):
    """``DatasetMapper`` with the same output, to the last bit, in less time (``tools/benchmarks/bench_mapper.py``)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        augmentations = self.augmentations.augs
        resizing = (T.ResizeShortestEdge, T.ResizeScale)
        augmentations[:] = [FastResize(a) if type(a) in resizing else a for a in augmentations]

    def __call__(self, dataset_dict: dict) -> dict:
        special = "sem_seg_file_name" in dataset_dict or self.proposal_topk is not None or not self.is_train
        if special or "annotations" not in dataset_dict:
            return super().__call__(dataset_dict)
        record = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        record = {**copy.deepcopy(record), "annotations": [_copied(a) for a in dataset_dict["annotations"]]}
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        return self._augmented(record, image)

    def _augmented(self, record: dict, image: np.ndarray) -> dict:
        """``record`` with the augmented image and its instances."""
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        self._transform_annotations(record, transforms, image.shape[:2])
        return record


def annotation_id(file_name: str, index: int) -> int:
    """A number in [0, 2^63) for annotation ``index`` of an image, the same in every process and run."""
    digest = hashlib.blake2b(f"{file_name}#{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class IdentifyingMapper(TrainMapper):
    """``DatasetMapper`` whose ``instances`` have ``gt_ids`` (N,) int64: the same object has the same id each time it is
    seen, however the image is augmented."""

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        annotations = dataset_dict["annotations"]
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        ids = [a.get("gt_id", annotation_id(dataset_dict["file_name"], i)) for i, a in enumerate(annotations)]
        # Detectron2 drops crowds and what a crop leaves empty. Which are left is read off the one label that it keeps.
        for i, annotation in enumerate(annotations):
            annotation["category_id"] = i
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        left = instances.gt_classes
        instances.gt_classes = classes[left]
        instances.gt_ids = torch.tensor(ids, dtype=torch.int64)[left]
