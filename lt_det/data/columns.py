"""The annotations of a data set in Detectron2's format as columns.

What looks at all images (filters, samplers, statistics, filling of queues) reads these and makes no dicts.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["AnnotationColumns", "annotation_columns", "box_centers", "images_that_fill"]


class AnnotationColumns(NamedTuple):
    """All annotations of a data set: parallel arrays of length M, ordered by image."""

    image: np.ndarray  # integer, position of the image in the data set
    category: np.ndarray  # integer, class index
    crowd: np.ndarray  # bool
    num_images: int


def annotation_columns(dataset_dicts: Sequence[Mapping[str, Any]]) -> AnnotationColumns:
    """The annotations of a data set in Detectron2's format as columns; no dict is made where it has them.

    Raises:
        ValueError: a class index is negative.
    """
    if hasattr(dataset_dicts, "columns"):
        return dataset_dicts.columns()
    annotations = [record.get("annotations") or () for record in dataset_dicts]
    lengths = np.fromiter(map(len, annotations), dtype=np.int64, count=len(annotations))
    total = int(lengths.sum())
    # Nearly all of the time goes into fetching a million dicts from memory; no Python frame is added to it.
    every = itertools.chain.from_iterable
    category = np.fromiter(map(operator.itemgetter("category_id"), every(annotations)), np.int64, count=total)
    crowd = np.fromiter(
        map(dict.get, every(annotations), itertools.repeat("iscrowd"), itertools.repeat(0)), bool, count=total
    )
    image = np.repeat(np.arange(len(annotations), dtype=np.int64), lengths)
    if category.size and category.min() < 0:
        at = int(image[category.argmin()])
        raise ValueError(
            f"Image {dataset_dicts[at].get('image_id', at)} has category_id {category.min()}; class indices start at 0."
        )
    return AnnotationColumns(image, category, crowd, len(annotations))


def box_centers(dataset_dicts: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """``(M, 2)`` box centres (x, y) of a data set in Detectron2's format in units of the image, in [0, 1), in the order
    of :func:`annotation_columns`; None where an image has no size, or an object no box along the axes."""
    if hasattr(dataset_dicts, "box_columns") and (columns := dataset_dicts.box_columns()) is not None:
        box, size = columns
    else:
        from detectron2.structures import BoxMode

        boxes, sizes = [], []
        for record in dataset_dicts:
            for annotation in record.get("annotations") or ():
                corners = annotation.get("bbox_mode") == BoxMode.XYXY_ABS
                if not (corners or annotation.get("bbox_mode") == BoxMode.XYWH_ABS) or not record.get("width"):
                    return None
                x, y, w, h = annotation["bbox"]
                boxes.append((x, y, w - x, h - y) if corners else (x, y, w, h))
                sizes.append((record["width"], record["height"]))
        box, size = np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(sizes, dtype=np.float64).reshape(-1, 2)
    return np.clip((box[:, :2] + box[:, 2:] / 2) / size, 0, np.nextafter(1, 0))


def images_that_fill(dataset_dicts: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> list[int]:
    """Indices of images that together fill a store of each class, or hold all there is of the class.

    Rare classes choose first, so that what fills them counts for the others. Crowd regions do not count.

    Args:
        dataset_dicts: the training set in Detectron2's format.
        sizes: ``(K,)`` room for each class.
    """
    image, category, crowd, num_images = annotation_columns(dataset_dicts)
    image, category = image[~crowd].astype(np.int64), category[~crowd]
    left = np.asarray(sizes).copy()
    of_image = np.searchsorted(image, np.arange(num_images + 1))
    pairs = np.unique(category * np.int64(num_images) + image)  # by class, then by image
    of_class = np.searchsorted(pairs, np.arange(len(left) + 1) * num_images)
    chosen = np.zeros(num_images, dtype=bool)
    for c in np.argsort(np.diff(of_class), kind="stable").tolist():
        for i in (pairs[of_class[c] : of_class[c + 1]] % max(1, num_images)).tolist():
            if left[c] <= 0:
                break
            if not chosen[i]:
                chosen[i] = True
                np.subtract.at(left, category[of_image[i] : of_image[i + 1]], 1)
    return np.flatnonzero(chosen).tolist()
