"""Ground truth of LVIS- and COCO-style data sets as flat arrays."""

from __future__ import annotations

import itertools
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from lt_det.frequency import FREQUENCY_GROUPS, GROUP_LIMITS
from lt_det.io.annotations import AREA, BOX, CATEGORY, CROWD, ID, IMAGE, ODD, OTHER, AnnotationBlock, scan_annotations
from lt_det.io.json_blocks import first_character, iter_json_blocks, with_json_module
from lt_det.io.segmentations import MAX_SIDE, has_usable_polygons, rle_totals

from .rle import RleTable, by_problem, encode_polygons, encode_segmentations

__all__ = ["FREQUENCY_GROUPS", "GroundTruth"]

logger = logging.getLogger(__name__)

AREA_RANGES = np.array([[0.0, 1e5**2], [0.0, 32.0**2], [32.0**2, 96.0**2], [96.0**2, 1e5**2]])
"""All, small, medium, large: inclusive limits in square pixels, as in the LVIS and COCO APIs."""


@dataclass
class GroundTruth:
    """Annotations of a data set, sorted by image and category.

    An image is known by its rank among the sorted image ids, a category by its rank among the sorted category ids. A
    *cell* is an (image, category) pair that the json says something about: it has annotations, or the category is
    listed in the image's ``neg_category_ids``.

    Attributes:
        federated: LVIS rules. A detection outside of every cell says nothing and is dropped, annotations and detections
            without area are dropped. Otherwise COCO rules: annotation is exhaustive, crowd annotations are ignored.
        image_ids (I,), image_sizes (I, 2: height, width), category_ids (K,): int64.
        category_names: K names.
        group (K,) int8: index into :data:`FREQUENCY_GROUPS`, -1 where unknown.
        image_count, instance_count (K,) int64: of the *training* set as the json states them, -1 where unknown.
        cell_start (I + 1,): cells of image ``i`` are ``cell_start[i]:cell_start[i + 1]``.
        cell_category, cell_lenient, cell_gt, cell_num_gt (C,): category, whether unmatched detections are ignored
            (``not_exhaustive_category_ids``), first annotation and number of annotations.
        boxes (N, 4) float64 as x, y, width, height; areas (N,) float64; ignore, crowd, void (N,) bool. ``void``:
            annotation id 0, see ``match_cells``.
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

    def members(self, group: str) -> np.ndarray:
        """(K,) bool, the categories of "r", "c" or "f"; "": all."""
        return self.group == FREQUENCY_GROUPS.index(group) if group else np.ones(self.num_categories, bool)

    def groups(self) -> dict[str, np.ndarray]:
        """:meth:`members` of "" (all) and of each frequency group that has any."""
        members = {group: self.members(group) for group in ("", *FREQUENCY_GROUPS)}
        return {group: part for group, part in members.items() if part.any()}

    def group_of(self, category: int) -> str:
        """The frequency group of a category by rank; "" where it has none."""
        return FREQUENCY_GROUPS[self.group[category]] if self.group[category] >= 0 else ""

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
        if first_character(path) != "{":
            raise ValueError(
                f"{path} is not an annotation json: an object with 'images', 'annotations' and 'categories'. "
                "Is it a results file?"
            )
        head: dict[str, list] = {}
        builder: GroundTruthBuilder | None = None
        typed = with_json_module(msgspec.json.Decoder(list[_Annotation]))
        passed_over = msgspec.json.Decoder(list[msgspec.Raw]).decode

        def annotations(text: bytes) -> AnnotationBlock | list:
            nonlocal builder
            if builder is None and len(head) == 2:
                builder = GroundTruthBuilder(head, federated, with_masks, path)
            if builder is None:
                return passed_over(text)
            block = scan_annotations(text)
            return typed(text) if block is None else block

        decoders = {
            "annotations": annotations,
            "images": with_json_module(msgspec.json.Decoder(list[_Image])),
            "categories": with_json_module(msgspec.json.Decoder(list[_Category])),
        }
        for reading in range(2):
            early = False  # annotations before images or categories, as in LVIS's files, wait for a second reading
            for key, block in iter_json_blocks(path, decoders):
                if key == "annotations" and builder is not None:
                    builder.add(block)
                elif key == "annotations":
                    early = True
                elif key in decoders and reading == 0:
                    head.setdefault(key, []).extend(block)
            if not early:
                break
        builder = builder or GroundTruthBuilder(head, federated, with_masks, path)
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
        builder = GroundTruthBuilder(content, federated, with_masks, source)
        annotations = content.get("annotations") or []
        if not isinstance(annotations, Sequence):
            raise ValueError(f"{source}: 'annotations' is {type(annotations).__name__}; a list is needed.")
        builder.add(annotations)
        return builder.build(frequency_groups)


# ---------------------------------------------------------------------- what a json has to say

_Id = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]


class _Annotation(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    area: float
    bbox: tuple[float, float, float, float]
    segmentation: Any = None
    iscrowd: int | bool | None = None
    ignore: int | bool | None = None


class _Image(msgspec.Struct):
    id: _Id
    height: _Side
    width: _Side
    neg_category_ids: list[_Id] | msgspec.UnsetType = msgspec.UNSET
    not_exhaustive_category_ids: list[_Id] | msgspec.UnsetType = msgspec.UNSET


class _Category(msgspec.Struct):
    id: _Id
    name: Any = None
    frequency: Any = msgspec.UNSET
    image_count: _Id = -1
    instance_count: _Id = -1


_T = TypeVar("_T", bound=msgspec.Struct)


def _typed(element: Any, kind: type[_T], member: str, source: str) -> _T:
    """One element of a json's ``member`` as ``kind``; the error names it."""
    if isinstance(element, kind):
        return element
    if isinstance(element, dict):
        element = {name: _plain(value) for name, value in element.items() if name in kind.__struct_fields__}
    try:
        return msgspec.convert(element, kind)
    except msgspec.ValidationError as error:
        known = f"of id {element['id']} " if isinstance(element, dict) and "id" in element else ""
        missing = "" if isinstance(element, dict) else f" ({str(element)[:80]})"
        raise ValueError(f"{source}: an element of '{member}' {known}is wrong: {error}{missing}. Correct it.") from None


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's, and whole floats as integers, which msgspec takes for both."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(v) for v in value] if any(isinstance(v, (np.generic, np.ndarray)) for v in value) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


class GroundTruthBuilder:
    """Collects annotations in parts, so that a large json need not be in memory at once."""

    def __init__(self, content: Mapping[str, Any], federated: bool | None, with_masks: bool, source: str):
        """``content``: "images" and "categories" of a json."""
        for key in ("images", "categories"):
            if not isinstance(content.get(key), (list, tuple)) or not content[key]:
                raise ValueError(f"{source}: '{key}' is missing or empty; an LVIS or COCO annotation json has it.")
        self.source = source
        self.with_masks = with_masks
        self.categories = sorted(
            (_typed(c, _Category, "categories", source) for c in content["categories"]), key=lambda c: c.id
        )
        self.category_ids = np.array([c.id for c in self.categories], np.int64)
        images = sorted((_typed(i, _Image, "images", source) for i in content["images"]), key=lambda i: i.id)
        self.image_ids = np.array([i.id for i in images], np.int64)
        for name, ids in (("image", self.image_ids), ("category", self.category_ids)):
            twice = ids[1:][ids[1:] == ids[:-1]]
            if twice.size:
                raise ValueError(f"{source}: {name} id {twice[0]} occurs more than once.")
        self.image_sizes = np.array([[i.height, i.width] for i in images], np.int64).reshape(-1, 2)
        lists = {"neg_category_ids", "not_exhaustive_category_ids"}
        if federated is None:
            federated = any(getattr(i, name) is not msgspec.UNSET for i in images for name in lists)
        self.federated = federated
        self.negative = self._listed(images, "neg_category_ids")
        self.lenient = self._listed(images, "not_exhaustive_category_ids")
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.num_read = self.num_skipped = 0
        self.mask_parts: list[RleTable] = []

    def _listed(self, images: Sequence[_Image], field: str) -> np.ndarray:
        """Sorted keys image * K + category of what ``field`` lists."""
        if not self.federated:
            return np.zeros(0, np.int64)
        lists = [getattr(image, field) for image in images]
        if any(ids is msgspec.UNSET for ids in lists):
            raise ValueError(
                f"{self.source}: an image has no '{field}', which the LVIS rules need. Evaluate it by COCO rules "
                "(federated=False), or add the field."
            )
        image = np.repeat(np.arange(len(lists)), [len(x) for x in lists])
        category = _ranks(self.category_ids, [c for x in lists for c in x])
        return _sorted_unique((image * len(self.category_ids) + category)[category >= 0])

    def add(self, block: AnnotationBlock | Sequence[Any]) -> None:
        """Adds annotations, parsed, in the order of the file.

        Raises:
            ValueError: some cannot be evaluated; the message names their ids.
        """
        n = len(block)
        if n == 0:
            return
        needed = ID | IMAGE | CATEGORY | BOX | AREA
        if isinstance(block, AnnotationBlock) and ((block.fields & (needed | ODD)) != needed).any():
            block = [block.element(i) for i in range(n)]
        segmentation_of: Callable[[int], Any]
        if isinstance(block, AnnotationBlock):
            ids, image_id, category_id, area, box = (
                block.identifier, block.image, block.category, block.area, block.box,
            )  # fmt: skip
            ignore = block.ignore != 0 if self.federated else (block.crowd != 0) & (block.fields & CROWD > 0)
            segmentation_of = block.segmentation
            usable = np.ones(n, bool)
            for i in np.flatnonzero(block.kind == OTHER).tolist():
                usable[i] = has_usable_polygons(segmentation_of(i))
        else:
            typed = [_typed(a, _Annotation, "annotations", self.source) for a in block]
            ids, image_id, category_id, area, box, ignore = self._columns(typed)
            segmentation_of = [a.segmentation for a in typed].__getitem__
            usable = np.array([has_usable_polygons(a.segmentation) for a in typed])
        crowd = np.zeros(n, bool) if self.federated else ignore
        image, category = _ranks(self.image_ids, image_id), _ranks(self.category_ids, category_id)
        self._refuse(ids, image < 0, "an image_id that is not among the file's images", image_id)
        self._refuse(ids, category < 0, "a category_id that is not among the file's categories", category_id)
        self._refuse(ids, ~np.isfinite(box).all(1), "a box with a number that is not finite")
        self._refuse(ids, (box[:, 2:] < 0).any(1), "a box of negative width or height")
        self._refuse(ids, np.isnan(area), "an area that is not a number")
        self.num_skipped += int((~usable).sum())
        if self.federated:
            usable &= (area > 0) & (area < np.inf)  # the LVIS API drops annotations without area
        kept = np.flatnonzero(usable)
        position = self.num_read + kept
        self.num_read += n
        self.parts.append((position, *(c[kept] for c in (ids, image, category, area, box, ignore, crowd))))
        if not self.with_masks:
            return
        polygons = np.zeros(n, bool)
        strings: list[bytes] = [b""] * n
        sizes = self.image_sizes[image]
        if isinstance(block, AnnotationBlock):
            polygons = block.parts > 0
            rows = np.flatnonzero(polygons)
            found, problems = encode_polygons(block.values, block.part_end, block.parts[rows], sizes[rows])
            for what, wrong in by_problem({rows[k]: problem for k, problem in problems.items()}, n):
                self._refuse(ids, wrong & usable, what)
            for i, string in zip(rows.tolist(), found):
                strings[i] = string
        others = kept[~polygons[kept]]
        if len(others):
            masks = self._masks(ids[others], [segmentation_of(i) for i in others.tolist()], sizes[others])
            for i, string in zip(others.tolist(), masks.strings()):
                strings[i] = string
        self.mask_parts.append(RleTable.from_strings([strings[i] for i in kept.tolist()], sizes[kept]))

    def _columns(self, block: list[_Annotation]) -> tuple[np.ndarray, ...]:
        """Ids, image ids, category ids, areas, boxes, and what is to be ignored."""
        n = len(block)
        every = itertools.chain.from_iterable
        ids, image_id, category_id = (
            np.fromiter(map(operator.attrgetter(field), block), np.int64, n)
            for field in ("id", "image_id", "category_id")
        )
        area = np.fromiter(map(operator.attrgetter("area"), block), np.float64, n)
        box = np.fromiter(every(map(operator.attrgetter("bbox"), block)), np.float64, 4 * n).reshape(n, 4)
        flags = operator.attrgetter("ignore" if self.federated else "iscrowd")
        ignore = np.fromiter(map(bool, map(flags, block)), bool, n)
        return ids, image_id, category_id, area, box, ignore

    def _masks(self, ids: np.ndarray, segmentations: list, sizes: np.ndarray) -> RleTable:
        self._refuse(
            ids, np.array([not s for s in segmentations], bool), "no 'segmentation' (for boxes alone: iou types bbox)"
        )
        masks, problems = encode_segmentations(segmentations, sizes)
        for what, wrong in by_problem(problems, len(ids)):
            self._refuse(ids, wrong, what)
        rle = [i for i, s in enumerate(segmentations) if isinstance(s, dict)]
        if rle:
            broken = np.zeros(len(ids), bool)
            broken[rle] = rle_totals(masks.take(rle).strings()) != sizes[rle].prod(1)
            self._refuse(ids, broken, "an RLE mask whose counts do not cover its image")
        return masks

    def _refuse(self, ids: np.ndarray, bad: np.ndarray, what: str, values: np.ndarray | None = None) -> None:
        rows = np.flatnonzero(bad)
        if rows.size:
            shown = ", ".join(map(str, ids[rows[:10]].tolist())) + (" ..." if rows.size > 10 else "")
            found = "" if values is None else f": {np.unique(values[rows])[:10].tolist()}"
            raise ValueError(
                f"{self.source}: {rows.size} annotations have {what}{found}; their ids: {shown}. Correct or remove "
                "them."
            )

    def build(self, frequency_groups: Mapping[str, Sequence[int]] | None = None) -> GroundTruth:
        num_categories = len(self.category_ids)
        if self.parts:
            position, ids, image, category, area, box, ignore, crowd = (np.concatenate(x) for x in zip(*self.parts))
        else:
            position = ids = image = category = np.zeros(0, np.int64)
            area, box = np.zeros(0), np.zeros((0, 4))
            ignore = crowd = np.zeros(0, bool)
        if self.num_skipped:
            logger.warning(
                f"{self.source}: skipped {self.num_skipped} objects without a polygon of three points or more, "
                "as training does."
            )
        unique, count = np.unique(ids, return_counts=True)
        if len(unique) != len(ids):
            raise ValueError(
                f"{self.source}: {int((count > 1).sum())} annotation ids occur more than once, {unique[count > 1][0]} "
                "for instance. The official API would evaluate one of them several times: renumber them."
            )
        if len(ids) and unique[0] <= 0 <= unique[-1] and 0 in unique:
            logger.warning(
                "%s has an annotation of id 0. The LVIS and COCO APIs take a match with it for no match, and so do "
                "the numbers here; number annotations from 1 to avoid it.",
                self.source,
            )
        key = image * num_categories + category
        order = np.lexsort((position, key))  # the place in the file decides between equal IoUs
        key = key[order]
        positive, first, count = np.unique(key, return_index=True, return_counts=True)
        cells = _sorted_unique(np.concatenate([positive, self.negative]))
        cell_gt = np.zeros(len(cells), np.int64)
        cell_num_gt = np.zeros(len(cells), np.int64)
        where = np.searchsorted(cells, positive)
        cell_gt[where], cell_num_gt[where] = first, count
        cell_image = cells // num_categories
        masks = RleTable.concatenate(self.mask_parts).take(order) if self.with_masks else None
        image_count, instance_count = (
            np.array([getattr(c, field) for c in self.categories], np.int64)
            for field in ("image_count", "instance_count")
        )
        group = self._groups(frequency_groups, image_count)
        if np.array_equal(image_count, np.bincount(positive % num_categories, minlength=num_categories)):
            # Counted here, as tools that cut files do: it says nothing of the training set.
            image_count, instance_count = np.full_like(image_count, -1), np.full_like(instance_count, -1)
        return GroundTruth(
            federated=self.federated,
            image_ids=self.image_ids,
            image_sizes=self.image_sizes,
            category_ids=self.category_ids,
            category_names=[str(c.id if c.name is None else c.name) for c in self.categories],
            group=group,
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
        if any(c.frequency is not msgspec.UNSET for c in self.categories):
            for k, c in enumerate(self.categories):
                if c.frequency not in FREQUENCY_GROUPS:
                    raise ValueError(
                        f"{self.source}: category {c.id} has frequency {str(c.frequency)[:50]}; it must be one of "
                        f"{FREQUENCY_GROUPS}."
                    )
                group[k] = FREQUENCY_GROUPS.index(c.frequency)
        elif (image_count >= 0).all():
            group = np.digitize(image_count, [most + 1 for most in GROUP_LIMITS]).astype(np.int8)
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


def _sorted_unique(keys: np.ndarray) -> np.ndarray:
    """``np.unique`` by sorting: numpy 2.3 and later hash integers first, which takes ten times as long here."""
    keys = np.sort(keys)
    return keys[np.concatenate([keys[:1] == keys[:1], keys[1:] != keys[:-1]])]


def _ranks(sorted_ids: np.ndarray, ids) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    if len(sorted_ids) == 0:
        return np.full(ids.shape, -1, np.int64)
    rank = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[rank] == ids, rank, -1)
