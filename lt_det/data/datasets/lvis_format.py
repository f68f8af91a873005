"""Annotation files in LVIS or COCO format as Detectron2 dataset dicts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..annotation_file import AnnotationFile, open_annotation_file
from ..records import MappedDataset

__all__ = ["load_lvis_or_coco_json"]

logger = logging.getLogger(__name__)


def load_lvis_or_coco_json(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    dataset_name: str | None = None,
    *,
    extra_annotation_keys: Sequence[str] = (),
    category_id_map: Mapping[int, int] | None = None,
    check_images: bool = True,
    lvis_fields: bool = False,
) -> MappedDataset:
    """Open an annotation file in LVIS v1, LVIS v0.5 or COCO format; the ``lvis`` package is not needed.

    The result is a sequence whose items equal those of Detectron2's ``load_lvis_json`` for files with LVIS's federated
    fields (``neg_category_ids``, ``not_exhaustive_category_ids``; both are kept as in the file, so they hold category
    ids and not class indices) and those of ``load_coco_json`` for others. Images without annotations stay. Masks may be
    polygons or RLE; polygons of fewer than three points are dropped, and an object whose polygons are all of that kind
    is skipped with a warning.

    A large file is read once; its columns are kept in lt_det's cache and mapped from there
    (:func:`lt_det.data.annotation_file.open_annotation_file`).

    Args:
        json_file: the annotation file.
        image_root: folder of the images. An image is looked for under it at ``<split>/<name>`` as its ``coco_url`` ends
            (LVIS), at its ``file_name``, at the last 12 digits of that (LVIS v0.5 calls COCO 2017's
            ``000000001268.jpg`` ``COCO_val2014_000000001268.jpg``), and at the bare name that ends its ``coco_url``.
            The first rule that holds for a sample of images is taken for all.
        dataset_name: if given, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` are put into this entry of
            the ``MetadataCatalog``.
        extra_annotation_keys: fields of the annotations to keep besides the standard ones.
        category_id_map: category id to class index; by default all categories of the file, ordered by id.
        check_images: look for the image files. With False, nothing but the annotation file is read, and the paths are
            those that Detectron2 would give.
        lvis_fields: hand on what ``load_lvis_json`` does, which does not know ``iscrowd`` and ``keypoints``.

    Raises:
        FileNotFoundError: the annotation file, the image folder or the images in it are not there.
        ValueError: not such a file, no images, annotations of unknown images or categories, or boxes and masks that
            training cannot take; the message names the annotations.
    """
    json_file = PathManager.get_local_path(os.fspath(json_file))
    start = time.perf_counter()
    file = open_annotation_file(json_file, extra_keys=extra_annotation_keys)
    if dataset_name is not None:
        _set_metadata(dataset_name, json_file, file, category_id_map)
    class_of = None
    if category_id_map is not None:
        ids = [category["id"] for category in file.meta["categories"]]
        class_of = np.array([category_id_map.get(i, -1) for i in ids], dtype=np.int32)
    dataset = MappedDataset(
        file, os.fspath(image_root), class_of=class_of, check_images=check_images, lvis_fields=lvis_fields
    )
    logger.info(
        f"{len(file)} images with {file.num_objects} annotations of {len(file.meta['categories'])} categories from"
        f" {json_file} in {time.perf_counter() - start:.1f} s"
    )
    return dataset


def _set_metadata(
    dataset_name: str, json_file: str, file: AnnotationFile, category_id_map: Mapping[int, int] | None
) -> None:
    names = {category["id"]: category["name"] for category in file.meta["categories"]}
    id_map = dict(category_id_map) if category_id_map is not None else {c: i for i, c in enumerate(names)}
    ordered = [names[i] for i in sorted(id_map, key=id_map.get)]
    set_metadata(dataset_name, json_file, thing_classes=ordered, thing_dataset_id_to_contiguous_id=id_map)


def set_metadata(dataset_name: str, source: str, /, **fields: Any) -> None:
    """Put fields into a ``MetadataCatalog`` entry, which may hold equal values but not other ones.

    ``source`` is the file that the fields come from, for the message.

    Raises:
        ValueError: the entry has another value already.
    """
    metadata = MetadataCatalog.get(dataset_name)
    for field, value in fields.items():
        old = metadata.get(field)
        if old is None:
            setattr(metadata, field, value)
        elif old != value:
            raise ValueError(
                f"Data set {dataset_name!r} has other {field} already than {source} gives "
                f"({str(old)[:80]} and {str(value)[:80]}). Choose another name for it."
            )
