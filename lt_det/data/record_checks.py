"""What dataset dicts of other people's code must be before an image is loaded from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from lt_det.io.segmentations import NO_POLYGON, is_sequence, polygon_problems, rle_problem, rle_totals, usable_polygons

__all__ = ["check_dataset_dicts"]


def check_dataset_dicts(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuses boxes and masks that a training cannot use, or that pycocotools crashes over.

    Args:
        records: in Detectron2's format. Images without width and height are not compared with their masks.

    Raises:
        ValueError: a box is not finite or of negative size, or a mask cannot be rasterised; the message names image and
            annotation.
    """
    objects = [(record, k, a) for record in records for k, a in enumerate(record.get("annotations") or ())]
    problems = {**_mask_problems(objects), **_box_problems(objects)}
    if problems:
        shown = []
        for i, problem in sorted(problems.items())[:5]:
            record, place, annotation = objects[i]
            image = record.get("image_id", record.get("file_name"))
            shown.append(f"annotation {annotation.get('id', place)} of image {image} has {problem}")
        raise ValueError(
            f"{len(problems)} annotations of a data set cannot be trained on: {'; '.join(shown)}. Correct or remove "
            "them."
        )


def _box_problems(objects: list[tuple]) -> dict[int, str]:
    rows = [i for i, (*_, a) in enumerate(objects) if a.get("bbox") is not None and len(a["bbox"]) == 4]
    if not rows:
        return {}
    boxes = np.array([objects[i][2]["bbox"] for i in rows], np.float64)
    mode = np.array([int(objects[i][2].get("bbox_mode", BoxMode.XYXY_ABS)) for i in rows])
    corners = np.isin(mode, (BoxMode.XYXY_ABS, BoxMode.XYXY_REL))[:, None]
    with np.errstate(invalid="ignore"):
        size = np.where(corners, boxes[:, 2:] - boxes[:, :2], boxes[:, 2:])
    problems = {rows[k]: "a box of negative width or height" for k in np.flatnonzero((size < 0).any(1)).tolist()}
    infinite = np.flatnonzero(~np.isfinite(boxes).all(1)).tolist()
    return problems | {rows[k]: "a box with a number that is not finite" for k in infinite}


def _mask_problems(objects: list[tuple]) -> dict[int, str]:
    problems: dict[int, str] = {}
    polygons, texts = [], []
    sizes: dict[int, tuple[int, int]] = {}
    for i, (record, _, annotation) in enumerate(objects):
        segmentation = annotation.get("segmentation")
        known = "height" in record and "width" in record
        if isinstance(segmentation, list) and segmentation:
            sizes[i] = (record["height"], record["width"]) if known else (1 << 13, 1 << 13)
            if all(map(is_sequence, segmentation)) and usable_polygons(segmentation):
                polygons.append(i)
            else:
                problems[i] = NO_POLYGON
        elif isinstance(segmentation, dict):
            size = segmentation.get("size")
            # Without a size of the image, the mask is compared with its own.
            sizes[i] = (record["height"], record["width"]) if known else tuple(size) if is_sequence(size) else (0, 0)
            if len(sizes[i]) != 2:
                sizes[i] = (0, 0)
            problem = rle_problem(segmentation, *sizes[i])
            if problem:
                problems[i] = problem
            elif isinstance(segmentation["counts"], (str, bytes)):
                texts.append(i)
    usable = [usable_polygons(objects[i][2]["segmentation"]) for i in polygons]
    wrong = polygon_problems(usable, np.array([sizes[i] for i in polygons], np.float64).reshape(-1, 2))
    problems |= {polygons[k]: problem for k, problem in wrong.items()}
    counts = [objects[i][2]["segmentation"]["counts"] for i in texts]
    totals = rle_totals([c.encode("ascii") if isinstance(c, str) else c for c in counts])
    for i, total in zip(texts, totals.tolist()):
        if total != sizes[i][0] * sizes[i][1]:
            problems[i] = "an RLE mask whose counts do not cover its image"
    return problems
