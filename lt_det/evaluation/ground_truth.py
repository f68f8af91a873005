"""Ground truth of LVIS- and COCO-style data sets as flat arrays."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .json_window import JsonWindow, parse_json
from .rle import RleTable, encode_segmentations

__all__ = ["FREQUENCY_GROUPS", "GroundTruth"]

logger = logging.getLogger(__name__)

FREQUENCY_GROUPS = ("r", "c", "f")
"""Rare, common, frequent: the groups of categories by number of training images."""

_GROUP_LIMITS = (10, 100)  # LVIS: rare 1-10 training images, common 11-100, frequent more

AREA_RANGES = np.array([[0.0, 1e5**2], [0.0, 32.0**2], [32.0**2, 96.0**2], [96.0**2, 1e5**2]])
"""All, small, medium, large: inclusive limits in square pixels, as in the LVIS and COCO APIs."""


@dataclass
class GroundTruth:
    """Annotations of a data set, sorted by image and category.

    An image is known by its rank among the sorted image ids, a category by its rank among the sorted category
    ids. A *cell* is an (image, category) pair that the json says something about: it has annotations, or the
    category is listed in the image's ``neg_category_ids``.

    Attributes:
        federated: LVIS rules. A detection outside of every cell says nothing and is dropped, annotations
            and detections without area are dropped. Otherwise COCO rules: annotation is exhaustive, crowd
            annotations are ignored.
        image_ids (I,), image_sizes (I, 2: height, width), category_ids (K,): int64.
        category_names: K names.
        group (K,) int8: index into :data:`FREQUENCY_GROUPS`, -1 where unknown.
        image_count, instance_count (K,) int64: of the *training* set as the json states them, -1 where
        unknown.
        cell_start (I + 1,): cells of image ``i`` are ``cell_start[i]:cell_start[i + 1]``.
        cell_category, cell_lenient, cell_gt, cell_num_gt (C,): category, whether unmatched detections are
            ignored (``not_exhaustive_category_ids``), first annotation and number of annotations.
        boxes (N, 4) float64 as x, y, width, height; areas (N,) float64; ignore, crowd, void (N,) bool.
            ``void``: annotation id 0, see ``match_cells``.
        masks: run-length encodings of the annotations, ``None`` when not loaded.
    """

    federated: bool
    image_ids: np.ndarray
    image_sizes: np.ndarray
    category_ids: np.ndarray
    category_names: list[str]
    group: np.ndarray
    image_count: np.ndarray
    instance_count: np.ndarray
    cell_start: np.ndarray
    cell_category: np.ndarray
    cell_lenient: np.ndarray
    cell_gt: np.ndarray
    cell_num_gt: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    ignore: np.ndarray
    crowd: np.ndarray
    void: np.ndarray
    masks: RleTable | None

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_categories(self) -> int:
        return len(self.category_ids)

    @property
    def num_annotations(self) -> int:
        return len(self.areas)

    @property
    def annotation_category(self) -> np.ndarray:
        """(N,) category rank of each annotation."""
        return np.repeat(self.cell_category, self.cell_num_gt)

    @property
    def annotation_image(self) -> np.ndarray:
        """(N,) image rank of each annotation."""
        return np.repeat(np.repeat(np.arange(self.num_images), np.diff(self.cell_start)), self.cell_num_gt)

    def image_ranks(self, image_ids) -> np.ndarray:
        """Rank of each image id, -1 where the data set has no such image."""
        return _ranks(self.image_ids, image_ids)

    def category_ranks(self, category_ids) -> np.ndarray:
        """Rank of each category id, -1 where the data set has no such category."""
        return _ranks(self.category_ids, category_ids)

    def num_gt(self) -> np.ndarray:
        """(K, A) annotations that count, by category and area range."""
        inside = (self.areas[:, None] >= AREA_RANGES[:, 0]) & (self.areas[:, None] <= AREA_RANGES[:, 1])
        inside &= ~self.ignore[:, None]
        out = np.zeros((self.num_categories, len(AREA_RANGES)), np.int64)
        category = self.annotation_category
        for a in range(len(AREA_RANGES)):
            out[:, a] = np.bincount(category[inside[:, a]], minlength=self.num_categories)
        return out

    @classmethod
    def from_json(
        cls,
        path: str | os.PathLike,
        *,
        with_masks: bool = True,
        federated: bool | None = None,
        frequency_groups: Mapping[str, Sequence[int]] | None = None,
    ) -> GroundTruth:
        """Reads an LVIS or COCO annotation json.

        Args:
            path: the json file.
            with_masks: load the masks too (mask and boundary AP need them).
            federated: LVIS rules (True), COCO rules (False), or by what the images carry (None).
            frequency_groups: category ids of each of "r", "c", "f"; by default the ``frequency`` field of the
                categories, else their ``image_count`` (1-10, 11-100, more).

        Raises:
            ValueError: the file is not such a json; the message names the field that is missing or wrong.
        """
        path = os.fspath(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no annotation file {path}.")
        head: dict[str, list] = {}
        builder: GroundTruthBuilder | None = None
        for reading in range(2):
            early = False  # annotations before images or categories have to wait for a second reading
            with JsonWindow(path) as window:
                if window.peek() != "{":
                    raise ValueError(
                        f"{path} is not an annotation json: an object with 'images', 'annotations' and "
                        f"'categories'. "
                        "Is it a results file?"
                    )
                for key in window.members():
                    if key in ("images", "categories") and reading == 0:
                        head[key] = [_needed(x) if key == "images" else x for part in window.elements() for x in part]
                    elif key == "annotations" and {"images", "categories"} <= set(head):
                        builder = _builder(head, federated, with_masks, path)
                        for part in window.element_bytes():
                            builder.add_json(part)
                    elif key == "annotations":
                        early = True
                        window.skip_elements()
                    else:
                        window.value()
            if not early:
                break
        builder = builder or _builder(head, federated, with_masks, path)
        return builder.build(frequency_groups)

    @classmethod
    def from_dict(
        cls,
        content: dict[str, Any],
        *,
        with_masks: bool = True,
        federated: bool | None = None,
        frequency_groups: Mapping[str, Sequence[int]] | None = None,
        source: str = "the ground truth",
    ) -> GroundTruth:
        """As :meth:`from_json`, from the parsed json."""
        builder = _builder(content, federated, with_masks, source)
        builder.add_annotations(content.get("annotations") or [])
        return builder.build(frequency_groups)


def _builder(content: Mapping[str, Any], federated: bool | None, with_masks: bool, source: str) -> GroundTruthBuilder:
    for key in ("images", "categories"):
        if not content.get(key):
            raise ValueError(f"{source}: '{key}' is missing or empty; an LVIS or COCO annotation json has it.")
    return GroundTruthBuilder(content["images"], content["categories"], federated, with_masks, source)


class GroundTruthBuilder:
    """Collects annotations in parts, so that a large json need not be in memory at once."""

    def __init__(self, images, categories, federated: bool | None, with_masks: bool, source: str):
        self.source = source
        self.with_masks = with_masks
        self.categories = sorted(categories, key=lambda c: c["id"])
        self.category_ids = np.array([c["id"] for c in self.categories], np.int64)
        images = sorted(images, key=lambda image: image["id"])
        self.image_ids = np.array([image["id"] for image in images], np.int64)
        for name, ids in (("image", self.image_ids), ("category", self.category_ids)):
            if len(np.unique(ids)) != len(ids):
                twice = ids[1:][ids[1:] == ids[:-1]]
                raise ValueError(f"{source}: {name} id {twice[0]} occurs more than once.")
        try:
            self.image_sizes = np.array([[i["height"], i["width"]] for i in images], np.int64).reshape(-1, 2)
        except KeyError as error:
            raise ValueError(f"{source}: an image has no {error} field.") from error
        if federated is None:
            federated = any("neg_category_ids" in i or "not_exhaustive_category_ids" in i for i in images)
        self.federated = federated
        self.negative = self._listed(images, "neg_category_ids")
        self.lenient = self._listed(images, "not_exhaustive_category_ids")
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.num_read = 0
        self.mask_parts: list[RleTable] = []

    def _listed(self, images, field: str) -> np.ndarray:
        """Sorted keys image * K + category of what ``field`` lists."""
        if not self.federated:
            return np.zeros(0, np.int64)
        try:
            lists = [image[field] for image in images]
        except KeyError:
            raise ValueError(
                f"{self.source}: an image has no '{field}', which the LVIS rules need. "
                "Evaluate it by COCO rules (federated=False), or add the field."
            ) from None
        image = np.repeat(np.arange(len(lists)), [len(x) for x in lists])
        category = _ranks(self.category_ids, [c for x in lists for c in x])
        return np.unique((image * len(self.category_ids) + category)[category >= 0])

    def add_annotations(self, annotations: Sequence[dict[str, Any]], position: np.ndarray | None = None) -> None:
        """Adds parsed annotations; ``position`` is their place in the file, by default behind those read so
        far."""
        if not annotations:
            return
        if position is None:
            position = self.num_read + np.arange(len(annotations))
            self.num_read += len(annotations)
        try:
            integers = np.array(
                [
                    (
                        a["id"],
                        a["image_id"],
                        a["category_id"],
                        bool(a.get("iscrowd", 0)),
                        bool(a.get("ignore", 0)),
                    )
                    for a in annotations
                ],
                np.int64,
            )
            numbers = np.array([(a["area"], *a["bbox"]) for a in annotations], np.float64).reshape(-1, 5)
        except KeyError as error:
            raise ValueError(f"{self.source}: an annotation has no {error} field.") from error

        def segmentations(kept: np.ndarray) -> list:
            return [annotations[i]["segmentation"] for i in kept]

        self._add(integers, numbers, segmentations, position)

    def add_json(self, text: np.ndarray) -> None:
        """Adds annotations as json, the bytes of a list's inside; only the segmentations become Python
        objects."""
        from ._json_kernels import parse_annotations

        place = 0
        while True:
            n = 1 << 15
            integers, numbers = np.zeros((n, 5), np.int64), np.zeros((n, 5))
            segmentation, objects = np.zeros((n, 2), np.int64), np.zeros((n, 2), np.int64)
            fields = np.zeros(n, np.uint8)
            rows, place = parse_annotations(text, place, len(text), integers, numbers, segmentation, objects, fields)
            if rows == 0:
                return
            usual = np.flatnonzero(fields[:rows] == 31)
            unusual = np.flatnonzero(fields[:rows] != 31)
            position = self.num_read + np.arange(rows)
            self.num_read += rows
            parsed = [parse_json(text[objects[i, 0] : objects[i, 1]].tobytes()) for i in unusual]
            self.add_annotations(parsed, position[unusual])
            ranges = segmentation[usual]

            def segmentations(kept: np.ndarray, ranges=ranges) -> list:
                if (ranges[kept, 1] == 0).any():
                    raise KeyError("segmentation")
                return parse_json(b"[" + b",".join(text[a:b].tobytes() for a, b in ranges[kept].tolist()) + b"]")

            self._add(integers[usual], numbers[usual], segmentations, position[usual])

    def _add(
        self,
        integers: np.ndarray,
        numbers: np.ndarray,
        segmentations: Callable[[np.ndarray], list],
        position: np.ndarray,
    ) -> None:
        """``integers`` (n, 5): id, image_id, category_id, iscrowd, ignore. ``numbers`` (n, 5): area and
        box."""
        ids, image, category = (
            integers[:, 0],
            _ranks(self.image_ids, integers[:, 1]),
            _ranks(self.category_ids, integers[:, 2]),
        )
        area, box = numbers[:, 0], numbers[:, 1:]
        if self.federated:
            crowd = np.zeros(len(ids), bool)
            ignore = integers[:, 4] != 0
            keep = (area > 0) & (area < np.inf)  # the LVIS API drops annotations without area
        else:
            crowd = ignore = integers[:, 3] != 0
            keep = np.ones(len(ids), bool)
        kept = np.flatnonzero(keep & (image >= 0) & (category >= 0))
        self.parts.append(tuple(c[kept] for c in (position, ids, image, category, area, box, ignore, crowd)))
        if self.with_masks:
            try:
                self.mask_parts.append(encode_segmentations(segmentations(kept), self.image_sizes[image[kept]]))
            except KeyError:
                raise ValueError(
                    f"{self.source}: an annotation has no 'segmentation'. Evaluate boxes alone (iou types: bbox)."
                ) from None

    def build(self, frequency_groups: Mapping[str, Sequence[int]] | None = None) -> GroundTruth:
        num_categories = len(self.category_ids)
        if self.parts:
            position, ids, image, category, area, box, ignore, crowd = (np.concatenate(x) for x in zip(*self.parts))
        else:
            position = ids = image = category = np.zeros(0, np.int64)
            area, box = np.zeros(0), np.zeros((0, 4))
            ignore = crowd = np.zeros(0, bool)
        unique, count = np.unique(ids, return_counts=True)
        if len(unique) != len(ids):
            raise ValueError(
                f"{self.source}: {int((count > 1).sum())} annotation ids occur more than once, "
                f"{unique[count > 1][0]} "
                "for instance. The official API would evaluate one of them several times: renumber them."
            )
        if len(ids) and unique[0] <= 0 <= unique[-1] and 0 in unique:
            logger.warning(
                "%s has an annotation of id 0. The LVIS and COCO APIs take a match with it for no match, "
                "and so do "
                "the numbers here; number annotations from 1 to avoid it.",
                self.source,
            )
        key = image * num_categories + category
        order = np.lexsort((position, key))  # the place in the file decides between equal IoUs
        key = key[order]
        positive, first, count = np.unique(key, return_index=True, return_counts=True)
        cells = np.union1d(positive, self.negative)
        cell_gt = np.zeros(len(cells), np.int64)
        cell_num_gt = np.zeros(len(cells), np.int64)
        where = np.searchsorted(cells, positive)
        cell_gt[where], cell_num_gt[where] = first, count
        cell_image = cells // num_categories
        masks = RleTable.concatenate(self.mask_parts).take(order) if self.with_masks else None
        image_count, instance_count = (
            np.array([int(c.get(field, -1)) for c in self.categories], np.int64)
            for field in ("image_count", "instance_count")
        )
        return GroundTruth(
            federated=self.federated,
            image_ids=self.image_ids,
            image_sizes=self.image_sizes,
            category_ids=self.category_ids,
            category_names=[str(c.get("name", c["id"])) for c in self.categories],
            group=self._groups(frequency_groups, image_count),
            image_count=image_count,
            instance_count=instance_count,
            cell_start=np.searchsorted(cell_image, np.arange(len(self.image_ids) + 1)).astype(np.int64),
            cell_category=cells % num_categories,
            cell_lenient=np.isin(cells, self.lenient),
            cell_gt=cell_gt,
            cell_num_gt=cell_num_gt,
            boxes=np.ascontiguousarray(box[order]),
            areas=area[order],
            ignore=ignore[order],
            crowd=crowd[order],
            void=ids[order] == 0,
            masks=masks,
        )

    def _groups(self, frequency_groups, image_count: np.ndarray) -> np.ndarray:
        group = np.full(len(self.category_ids), -1, np.int8)
        if frequency_groups is not None:
            unknown = set(frequency_groups) - set(FREQUENCY_GROUPS)
            if unknown:
                raise ValueError(f"frequency_groups has keys {sorted(unknown)}; the groups are {FREQUENCY_GROUPS}.")
            for name, category_ids in frequency_groups.items():
                rank = _ranks(self.category_ids, category_ids)
                if (rank < 0).any():
                    missing = np.asarray(category_ids)[rank < 0][:5].tolist()
                    raise ValueError(
                        f"frequency_groups['{name}'] has category ids that {self.source} has not: {missing}. "
                        "They are the ids of the json, not class indices."
                    )
                group[rank] = FREQUENCY_GROUPS.index(name)
            return group
        if any("frequency" in c for c in self.categories):
            for k, c in enumerate(self.categories):
                if c.get("frequency") not in FREQUENCY_GROUPS:
                    raise ValueError(
                        f"{self.source}: category {c['id']} has frequency {c.get('frequency')!r}; "
                        f"it must be one of {FREQUENCY_GROUPS}."
                    )
                group[k] = FREQUENCY_GROUPS.index(c["frequency"])
        elif (image_count >= 0).all():
            group = np.digitize(image_count, [_GROUP_LIMITS[0] + 1, _GROUP_LIMITS[1] + 1]).astype(np.int8)
        return group


def rank_table(sorted_ids: np.ndarray, most: int = 1 << 22) -> np.ndarray:
    """(last - first + 1,) int32 rank of each id from the first to the last, -1 in gaps.

    Empty where that would be more than ``most`` entries.
    """
    size = int(sorted_ids[-1]) - int(sorted_ids[0]) + 1
    if size > most:
        return np.zeros(0, np.int32)
    table = np.full(size, -1, np.int32)
    table[sorted_ids - sorted_ids[0]] = np.arange(len(sorted_ids))
    return table


def _ranks(sorted_ids: np.ndarray, ids) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    if len(sorted_ids) == 0:
        return np.full(ids.shape, -1, np.int64)
    rank = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[rank] == ids, rank, -1)


def _needed(image: dict[str, Any]) -> dict[str, Any]:
    fields = ("id", "height", "width", "neg_category_ids", "not_exhaustive_category_ids")
    return {name: image[name] for name in fields if name in image}
