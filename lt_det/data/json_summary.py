"""What an annotation file says about its categories."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .annotation_file import AnnotationFile, open_annotation_file

__all__ = [
    "JsonSummary",
    "image_and_instance_counts",
    "is_federated_image",
    "summarize_json",
]


@dataclass(frozen=True)
class JsonSummary:
    """Categories of an annotation file, ordered by id, with what the file's annotations count.

    ``image_count`` and ``instance_count`` are counted from the annotations. Only for a bare list of categories (LVIS's
    ``*_cat_info.json``) or a file without annotations (LVIS's ``image_info``) are they those that the categories state,
    and ``counted`` is False then. ``fractal_dimension`` is of the annotations' boxes.
    """

    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    frequency: tuple[str, ...] | None
    image_count: tuple[int, ...] | None
    instance_count: tuple[int, ...] | None
    num_images: int | None
    federated: bool
    counted: bool
    fractal_dimension: tuple[float, ...] | None = None


def is_federated_image(image: dict) -> bool:
    """Whether an image record carries LVIS's federated fields."""
    return "neg_category_ids" in image or "not_exhaustive_category_ids" in image


def image_and_instance_counts(
    image: np.ndarray, category: np.ndarray, num_images: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """``(K,)`` images that hold each class, and its instances.

    Args:
        image: ``(M,)`` image of each object, ascending.
        category: ``(M,)`` its class.
    """
    pairs = np.sort(image.astype(np.int64) * num_classes + category, kind="stable")
    present = pairs[np.diff(pairs, prepend=-1) > 0] % num_classes
    return np.bincount(present, minlength=num_classes), np.bincount(category, minlength=num_classes)


def summarize_json(
    path: str | os.PathLike, *, cache: bool | None = None, cache_folder: Path | None = None
) -> JsonSummary:
    """Summarise an LVIS or COCO json file, or a json list of categories.

    Crowd regions and objects without a usable mask are not counted, since they never become a training instance.

    Args:
        path: the json file.
        cache, cache_folder: see :func:`lt_det.data.annotation_file.open_annotation_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a json of this kind; the message says what is wrong.
    """
    path = os.path.abspath(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no annotation file {path}. Check the path, or put the file there.")
    with open(path, "rb") as file:
        first = file.read(64).lstrip()[:1]
    if first == b"[":
        return _summarize_categories(path)
    return _summarize_annotations(open_annotation_file(path, cache=cache, cache_folder=cache_folder))


def _summarize_categories(path: str) -> JsonSummary:
    with open(path, encoding="utf-8") as file:
        try:
            categories = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not valid json: {error}") from error
    return _from_category_fields(path, categories, num_images=None, federated=False)


def _from_category_fields(path: str, categories: list, num_images: int | None, federated: bool) -> JsonSummary:
    ids, names, frequency = _check_categories(path, categories)
    ordered = sorted(categories, key=lambda c: c["id"])

    def column(field: str) -> tuple[int, ...] | None:
        if not all(field in c for c in ordered):
            return None
        return tuple(int(c[field]) for c in ordered)

    return JsonSummary(
        ids, names, frequency, column("image_count"), column("instance_count"), num_images, federated, False
    )


def _check_categories(path: str, categories: Any):
    if not categories:
        raise ValueError(f"{path} has no categories. An LVIS or COCO json needs a list 'categories'.")
    for category in categories:
        if not isinstance(category, dict) or "id" not in category or "name" not in category:
            raise ValueError(f"{path}: every category needs 'id' and 'name', found {str(category)[:200]}.")
    ordered = sorted(categories, key=lambda c: c["id"])
    ids = tuple(c["id"] for c in ordered)
    if len(set(ids)) != len(ids):
        twice = sorted(i for i in set(ids) if ids.count(i) > 1)
        raise ValueError(f"{path}: category ids occur more than once: {twice[:10]}.")
    names = tuple(str(c["name"]) for c in ordered)
    frequency = None
    if all(c.get("frequency") in ("r", "c", "f") for c in ordered):
        frequency = tuple(c["frequency"] for c in ordered)
    return ids, names, frequency


def _summarize_annotations(file: AnnotationFile) -> JsonSummary:
    categories, federated = file.meta["categories"], file.meta["federated"]
    if not file.meta["has_annotations"]:
        return _from_category_fields(file.path, categories, len(file), federated)
    ids, names, frequency = _check_categories(file.path, categories)
    image = np.repeat(np.arange(len(file)), np.diff(file.first))
    image_count, instance_count = image_and_instance_counts(
        image[~file.crowd], file.category[~file.crowd], len(file), len(ids)
    )
    return JsonSummary(
        category_ids=ids,
        names=names,
        frequency=frequency,
        image_count=tuple(image_count.tolist()),
        instance_count=tuple(instance_count.tolist()),
        num_images=len(file),
        federated=federated,
        counted=True,
        fractal_dimension=tuple(file.fractal_dimension.tolist()),
    )
