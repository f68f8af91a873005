"""A dataset mapper whose instances say which annotation they are."""

from __future__ import annotations

import hashlib

import torch
from detectron2.data import DatasetMapper

__all__ = ["IdentifyingMapper", "annotation_id"]


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
        ids = [a.get("gt_id", annotation_id(dataset_dict["file_name"], i)) for i, a in enumerate(annotations)]
        # Detectron2 drops crowds and what a crop leaves empty. Which are left is read off the one label that it keeps.
        for i, annotation in enumerate(annotations):
            annotation["category_id"] = i
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        left = instances.gt_classes
        instances.gt_classes = classes[left]
        instances.gt_ids = torch.tensor(ids, dtype=torch.int64)[left]
