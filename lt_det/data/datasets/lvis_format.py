"""Annotation files in LVIS or COCO format as Detectron2 dataset dicts."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..json_stream import iter_json_members
from ..json_summary import has_usable_segmentation, is_federated_image

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
) -> list[dict]:
    """Load an annotation file in LVIS v1, LVIS v0.5 or COCO format; the ``lvis`` package is not needed.

    The result equals that of Detectron2's ``load_lvis_json`` for files with LVIS's federated fields
    (``neg_category_ids``, ``not_exhaustive_category_ids``; both are kept as in the file, so they hold
    category ids and not class indices) and that of ``load_coco_json`` for others. Images without
    annotations stay. Masks may be polygons or RLE; polygons of fewer than three points are dropped, and an
    object whose polygons are all of that kind is skipped with a warning.

    Args:
        json_file: the annotation file.
        image_root: folder of the images. An image is looked for under it at ``<split>/<name>`` as its
            ``coco_url`` ends (LVIS), at its ``file_name``, at the last 12 digits of that (LVIS v0.5 calls
            COCO 2017's ``000000001268.jpg`` ``COCO_val2014_000000001268.jpg``), and at the bare name that
            ends its ``coco_url``. The first rule that holds for a sample of images is taken for all.
        dataset_name: if given, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` are put into this
            entry of the ``MetadataCatalog``.
        extra_annotation_keys: fields of the annotations to keep besides the standard ones.
        category_id_map: category id to class index; by default all categories of the file, ordered by id.
        check_images: look for the image files. With False, nothing but the annotation file is read, and the
            paths are those that Detectron2 would give.

    Raises:
        FileNotFoundError: the annotation file, the image folder or the images in it are not there.
        ValueError: not such a file, no images, or annotations of unknown images or categories.
    """
    json_file = PathManager.get_local_path(os.fspath(json_file))
    image_root = os.fspath(image_root)
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"There is no annotation file {json_file}. Check the path, or put the file there.")
    start = time.perf_counter()
    with _no_garbage_collection():
        content = _read(json_file, extra_annotation_keys)
        id_map = dict(category_id_map) if category_id_map is not None else None
        if id_map is None:
            id_map = {c: i for i, c in enumerate(sorted(category["id"] for category in content.categories))}
        federated = any(is_federated_image(image) for image in content.images)
        images = sorted(content.images, key=lambda image: image["id"])
        path_of = _path_rule(json_file, image_root, images, federated, check_images)
        records = _records(json_file, images, content.objects, id_map, federated, path_of)
    if dataset_name is not None:
        _set_metadata(dataset_name, json_file, content.categories, id_map)
    instances = sum(len(record["annotations"]) for record in records)
    logger.info(
        f"Loaded {len(records)} images with {instances} annotations of {len(id_map)} categories from"
        f" {json_file} in {time.perf_counter() - start:.1f} s"
    )
    return records


@contextlib.contextmanager
def _no_garbage_collection():
    # Millions of new containers, none of them garbage: every pass of the collector would be in vain, and
    # together they cost more than the parsing.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Content(NamedTuple):
    images: list[dict]
    categories: list[dict]
    objects: dict[Any, list[dict]]  # by image id; category_id is still that of the file


_NEEDED = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _read(json_file: str, extra_annotation_keys: Sequence[str]) -> _Content:
    """Read the file in a stream, so that neither its text nor what is not needed of it stays in memory."""
    content = _Content([], [], {})
    optional = ("iscrowd", "keypoints", *extra_annotation_keys)
    ids: dict[str, set] = {name: set() for name in _NEEDED}
    twice: dict[str, list] = {name: [] for name in _NEEDED}
    members: set[str] = set()
    skipped = 0
    size = os.path.getsize(json_file)
    progress = tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        desc=f"loading {os.path.basename(json_file)}",
        disable=size < 32 << 20,
    )
    with progress:
        for name, item in iter_json_members(json_file, tuple(_NEEDED), members=members, on_read=progress.update):
            if name not in _NEEDED:
                continue
            if not isinstance(item, dict) or any(field not in item for field in _NEEDED[name]):
                lacking = [f for f in _NEEDED[name] if f not in item] if isinstance(item, dict) else "its fields"
                raise ValueError(f"{json_file}: an element of {name!r} lacks {lacking}: {str(item)[:200]}")
            if item["id"] in ids[name]:
                twice[name].append(item["id"])
            ids[name].add(item["id"])
            if name == "images":
                content.images.append(item)
            elif name == "categories":
                content.categories.append(item)
            elif has_usable_segmentation(item):
                content.objects.setdefault(item["image_id"], []).append(_object(json_file, item, optional))
            else:
                skipped += 1
    for name in ("images", "categories"):
        if not ids[name]:
            raise ValueError(
                f"{json_file} has no {name}. An LVIS or COCO json has the members 'images', 'annotations' "
                f"and 'categories'; this file has {sorted(members) or 'nothing'}."
            )
    for name, repeated in twice.items():
        message = f"{json_file}: ids occur more than once in {name!r}: {repeated[:10]}."
        if repeated and name != "annotations":
            raise ValueError(message)
        if repeated:
            # Seen in published data sets. Training does not look at these ids.
            logger.warning(f"{message} Evaluators that look annotations up by id will confuse them.")
    if skipped:
        logger.warning(f"{json_file}: skipped {skipped} objects without a polygon of three points or more.")
    return content


def _object(json_file: str, annotation: dict, optional: Sequence[str]) -> dict:
    if len(annotation["bbox"]) != 4:
        raise ValueError(
            f"{json_file}: annotation {annotation['id']} has bbox {annotation['bbox']}; a box is [x, y, width, height]."
        )
    obj = {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": annotation["category_id"],
    }
    segmentation = annotation.get("segmentation")
    if segmentation:
        obj["segmentation"] = _segmentation(segmentation)
    for key in optional:
        if key in annotation:
            obj[key] = annotation[key]
    if obj.get("keypoints"):
        # Keypoints are pixel indices and Detectron2's coordinates are continuous; visibility stays.
        obj["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(obj["keypoints"])]
    return obj


def _path_rule(
    json_file: str, image_root: str, images: list[dict], federated: bool, check_images: bool
) -> Callable[[dict], str]:
    def by_url_split(image: dict) -> str | None:
        parts = (image.get("coco_url") or "").split("/")
        # Detectron2 names LVIS's image folder with a slash at its end and puts the two together as they are.
        return os.path.join(image_root, *parts[-2:]) if len(parts) > 1 else None

    def by_file_name(image: dict) -> str | None:
        return os.path.join(image_root, image["file_name"]) if image.get("file_name") else None

    def by_digits(image: dict) -> str | None:
        name = os.path.basename(image.get("file_name") or "")
        stem, extension = os.path.splitext(name)
        return os.path.join(image_root, stem[-12:] + extension) if stem[-12:].isdigit() else None

    def by_url_name(image: dict) -> str | None:
        name = (image.get("coco_url") or "").split("/")[-1]
        return os.path.join(image_root, name) if name else None

    # COCO's own files have both fields, and their image folder is that of the split.
    first = (by_url_split, by_file_name) if federated else (by_file_name, by_url_split)
    rules = (*first, by_digits, by_url_name)
    nameless = next((image for image in images if all(rule(image) is None for rule in rules)), None)
    if nameless is not None:
        raise ValueError(
            f"{json_file}: image {nameless['id']} has neither 'file_name' nor 'coco_url', so that its file "
            "cannot be found."
        )

    def fallback(image: dict) -> str:
        return next(path for path in (rule(image) for rule in rules) if path is not None)

    if not check_images:
        return fallback
    if not PathManager.isdir(image_root):
        raise FileNotFoundError(
            f"There is no image folder {image_root} for {json_file}. Put the images there, or name the right folder."
        )
    step = max(1, len(images) // 8)
    sample = images[::step]
    for rule in rules:
        paths = [rule(image) for image in sample]
        if all(path is not None and PathManager.isfile(path) for path in paths):
            return lambda image: rule(image) or fallback(image)

    # No one rule finds the whole sample: the folder may be mixed, so ask for every image.
    located: dict[Any, str] = {}
    missing = []
    for image in images:
        candidates = [path for path in (rule(image) for rule in rules) if path is not None]
        found = next((path for path in candidates if PathManager.isfile(path)), None)
        if found is None:
            missing.append(candidates)
        else:
            located[image["id"]] = found
    if missing:
        tried = ", ".join(dict.fromkeys(missing[0]))
        raise FileNotFoundError(
            f"{len(missing)} of the {len(images)} images of {json_file} are not under {image_root}; for the "
            f"first one these paths were tried: {tried}. Put the images there, or name the right folder."
        )
    return lambda image: located[image["id"]]


def _records(
    json_file: str,
    images: list[dict],
    objects: Mapping[Any, list[dict]],
    id_map: Mapping[int, int],
    federated: bool,
    path_of: Callable[[dict], str],
) -> list[dict]:
    strays = sorted(set(objects) - {image["id"] for image in images}, key=str)
    if strays:
        raise ValueError(
            f"{json_file}: annotations have an image_id that is not among the file's images: {strays[:10]}."
        )
    records = []
    for image in images:
        record = {"file_name": path_of(image), "height": image["height"], "width": image["width"]}
        if federated:
            record["not_exhaustive_category_ids"] = image.get("not_exhaustive_category_ids", [])
            record["neg_category_ids"] = image.get("neg_category_ids", [])
        record["image_id"] = image["id"]
        record["annotations"] = objects.get(image["id"], [])
        for obj in record["annotations"]:
            category = id_map.get(obj["category_id"])
            if category is None:
                raise ValueError(
                    f"{json_file}: an annotation of image {image['id']} has category_id {obj['category_id']},"
                    " which is not among the file's categories."
                )
            obj["category_id"] = category
        records.append(record)
    return records


def _segmentation(segmentation: list | dict) -> list | dict:
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    return segmentation


def _set_metadata(dataset_name: str, json_file: str, categories: list, id_map: Mapping[int, int]) -> None:
    names = {category["id"]: category["name"] for category in categories}
    ordered = [names[i] for i in sorted(id_map, key=id_map.get)]
    set_metadata(dataset_name, json_file, thing_classes=ordered, thing_dataset_id_to_contiguous_id=dict(id_map))


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
