"""Reads an annotation file in LVIS or COCO format into the columns of an :class:`AnnotationFile`, with all checks.

Usual annotations come as columns from the scanner; others go one by one, as Detectron2's loaders would take them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pycocotools.mask as mask_util

from lt_det.io.annotations import (
    BOX,
    CATEGORY,
    FLOATS,
    ID,
    IMAGE,
    INTEGERS,
    NONE,
    ODD,
    AnnotationBlock,
    scan_annotations,
)
from lt_det.io.json_blocks import iter_json_blocks, with_json_module
from lt_det.io.segmentations import MAX_OUTLINE, MAX_SIDE, REACH, outline_steps, rle_totals, usable_polygons
from lt_det.progress import progress_bar

from .fractal import fractal_dimensions

__all__ = ["SegmentKind", "read_columns"]

logger = logging.getLogger(__name__)

_EXACT = 2**53  # integers up to here are themselves as float64


class SegmentKind:
    """How an object's mask is kept."""

    NONE, FLOATS, INTEGERS, TEXT = range(4)


_UNDECIDED = 255
_KINDS = np.full(256, _UNDECIDED, np.uint8)  # of what the scanner says of a segmentation
_KINDS[[NONE, FLOATS, INTEGERS]] = SegmentKind.NONE, SegmentKind.FLOATS, SegmentKind.INTEGERS
_NOTHING = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [0, 0, 0, 0]}


def read_columns(
    path: str,
    extra_keys: Sequence[str],
    write_points: Callable[[np.ndarray], Any],
    write_text: Callable[[np.ndarray], Any],
    on_bytes: Callable[[bytes], Any] | None,
    *,
    progress: bool,
) -> tuple[dict[str, np.ndarray], dict]:
    """Read an annotation file.

    Args:
        path: the json file.
        extra_keys: fields of the annotations to keep besides the standard ones.
        write_points, write_text: take the coordinates (float64) and the text (uint8) as they come.
        on_bytes: takes what is read of the file, in order.
        progress: show a progress bar.

    Returns:
        The other columns of an ``AnnotationFile`` by name, and its ``meta``.

    Raises:
        ValueError: it is not such a json; the message says what is wrong.
    """
    title = f"reading {os.path.basename(path)}"
    bar = progress_bar(total=os.path.getsize(path), unit="B", unit_scale=True, desc=title, show=progress)

    def on_read(data: bytes) -> None:
        bar.update(len(data))
        if on_bytes is not None:
            on_bytes(data)

    plain = with_json_module(msgspec.json.Decoder(list[dict]))

    def objects(text: bytes) -> AnnotationBlock | list:
        block = None if extra_keys else scan_annotations(text)
        return plain(text) if block is None else block

    decoders = {"annotations": objects, "images": plain, "categories": plain}
    reader = _Reader(path, extra_keys, write_points, write_text)
    members = set()
    with bar, _no_garbage_collection():
        for name, value in iter_json_blocks(path, decoders, on_read=on_read):
            members.add(name)
            if name == "annotations":
                reader.add_objects(value)
            elif name == "images":
                reader.add_images(value)
            elif name == "categories":
                reader.categories += value
    return reader.finish(members)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # A million new objects, none of them garbage in a cycle: every pass of the collector would be in vain.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Reader:
    """Collects the columns, objects in the order of the file; points and text go out as they come."""

    def __init__(self, path: str, extra_keys: Sequence[str], write_points: Callable, write_text: Callable):
        self.path = path
        self.categories: list[dict] = []
        self._extra_keys = extra_keys
        self._write_points, self._write_text = write_points, write_text
        self._codes: dict[Any, int] = {}  # of ids that are not integers
        self._blocks: dict[str, list[np.ndarray]] = {}
        self._images: list[tuple] = []  # (id, code, width, height, text start, text length)
        self._num_points = self._num_parts = self._num_text = 0
        self._plain_json = False
        self._federated = False
        self._num_skipped = 0
        self._rle_texts: list[tuple[str, bytes, int]] = []  # of the block at hand: name, counts, pixels
        self._num_objects = 0

    def _fail(self, kind: str, element: Any, why: str) -> ValueError:
        return ValueError(f"{self.path}: an element of {kind!r} {why}: {str(element)[:200]}")

    def _code(self, identifier: Any, kind: str) -> int:
        if type(identifier) is int and abs(identifier) < 2**62:
            return identifier
        if type(identifier) not in (str, float, int):
            raise self._fail(kind, identifier, "has an id that is neither a number nor a text")
        return self._codes.setdefault(identifier, -(2**62) - len(self._codes))

    def _put_text(self, text: bytes) -> int:
        start = self._num_text
        self._write_text(np.frombuffer(text, np.uint8))
        self._num_text += len(text)
        return start

    def _dumps(self, value: Any) -> bytes:
        """Json that :attr:`AnnotationFile._loads` turns into an equal value."""
        try:
            text = msgspec.json.encode(value)
            if b"null" not in text or msgspec.json.decode(text) == value:  # NaN is written as null
                return text
        except (msgspec.MsgspecError, ValueError, OverflowError, TypeError):
            pass
        self._plain_json = True
        return json.dumps(value).encode("ascii")

    # ---------------------------------------------------------------------------------------------------------- images

    _IMAGE_FIELDS = ("file_name", "coco_url", "height", "width", "id")
    _FEDERATED_FIELDS = ("not_exhaustive_category_ids", "neg_category_ids")

    def add_images(self, block: list) -> None:
        texts, start = [], self._num_text
        for image in block:
            if not isinstance(image, dict) or any(field not in image for field in ("id", "height", "width")):
                lacking = (
                    [f for f in ("id", "height", "width") if f not in image]
                    if isinstance(image, dict)
                    else "its fields"
                )
                raise self._fail("images", image, f"lacks {lacking}")
            size = image["width"], image["height"]
            if not all(type(v) in (int, float) and 0 < v <= MAX_SIDE for v in size):
                raise self._fail("images", image, f"has a width or height that is not a number from 1 to {MAX_SIDE}")
            if not all(isinstance(image.get(f), (str, type(None))) for f in ("file_name", "coco_url")):
                raise self._fail("images", image, "has a file_name or coco_url that is not a text")
            fields = {f: image[f] for f in (*self._IMAGE_FIELDS, *self._FEDERATED_FIELDS) if f in image}
            if not (image.get("file_name") or "/" in (image.get("coco_url") or "")):
                raise ValueError(
                    f"{self.path}: image {image['id']} has neither 'file_name' nor 'coco_url', so that its file "
                    "cannot be found."
                )
            self._federated = self._federated or any(f in image for f in self._FEDERATED_FIELDS)
            text = self._dumps(fields)
            self._images.append((image["id"], self._code(image["id"], "images"), *size, start, len(text)))
            texts.append(text)
            start += len(text)
        self._put_text(b"".join(texts))

    # --------------------------------------------------------------------------------------------------------- objects

    def add_objects(self, block: AnnotationBlock | list) -> None:
        if not len(block):
            return
        columns = self._fast(block) if isinstance(block, AnnotationBlock) else self._slow(block)
        for name, column in columns.items():
            self._blocks.setdefault(name, []).append(column)
        self._num_objects += len(columns["image"])
        if self._rle_texts:
            names, texts, pixels = zip(*self._rle_texts)
            self._rle_texts = []
            wrong = np.flatnonzero(rle_totals(texts) != np.array(pixels))
            if wrong.size:
                raise ValueError(
                    f"{names[wrong[0]]} (and {wrong.size - 1} more) has an RLE mask whose counts do not cover its "
                    "image. Correct or remove it."
                )

    def _fast(self, block: AnnotationBlock) -> dict[str, np.ndarray]:
        needed = ID | IMAGE | CATEGORY | BOX
        columns = {
            "annotation_id": block.identifier,
            "image": block.image,
            "category": block.category,
            "crowd": block.crowd,
            "box": block.box,
            "box_integer": block.box_integer,
        }
        usual = (
            ((block.fields & (needed | ODD)) == needed).all()
            and not block.ignore.any()
            and np.isin(block.crowd, (-1, 0, 1)).all()
            and not (block.box_integer.any() and np.abs(block.box).max() > _EXACT)
        )
        if not usual:
            return self._slow([block.element(i) for i in range(len(block))])
        columns |= _no_masks(len(block))
        columns["kind"] = _KINDS[block.kind]
        columns["reach"] = block.reach
        if len(block.values):
            fast, lengths = np.flatnonzero(block.parts), np.diff(block.part_end, prepend=0)
            self._add_parts(columns, fast, block.values, lengths, block.parts[fast])
        keep = np.ones(len(block), dtype=bool)
        for i in np.flatnonzero(columns["kind"] == _UNDECIDED).tolist():
            keep[i] = self._one_mask(columns, i, block.element(i), {})
        return {name: values[keep] for name, values in columns.items()} if not keep.all() else columns

    def _add_parts(
        self, columns: dict, rows: np.ndarray, values: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ) -> None:
        """Masks of the objects ``rows``, whose ``reach`` is known: ``lengths`` of all their polygons, ``counts`` of
        polygons of each."""
        ends = np.cumsum(lengths)
        last = np.cumsum(counts)
        # Each object's first entry is where its first polygon starts, so that it needs no other object's.
        starts = np.insert(ends, 0, 0)
        first_part = last - counts
        position = self._num_parts + first_part + np.arange(len(rows))
        entries = np.insert(ends, first_part, starts[first_part])
        columns["part"][rows] = position
        columns["part_count"][rows] = counts
        self._mark_long(columns, rows, values, ends, starts[first_part])
        self._blocks.setdefault("part_end", []).append(entries + self._num_points)
        self._write_points(values)
        self._num_parts += len(entries)
        self._num_points += len(values)

    @staticmethod
    def _mark_long(columns: dict, rows: np.ndarray, values: np.ndarray, ends: np.ndarray, begin: np.ndarray) -> None:
        """``begin``: the first number of each object. Exact lengths for those alone whose bound is beyond the limit."""
        numbers = np.diff(np.append(begin, len(values)))
        suspects = np.flatnonzero(~(numbers * columns["reach"][rows] <= MAX_OUTLINE))
        for k in suspects.tolist():
            part = slice(begin[k], begin[k] + numbers[k])
            own = ends[(ends > part.start) & (ends <= part.stop)] - part.start
            with np.errstate(invalid="ignore", over="ignore"):
                steps = outline_steps(values[part].reshape(-1, 2), own // 2)
            columns["long"][rows[k]] = steps.sum() > MAX_OUTLINE

    def _slow(self, block: list) -> dict[str, np.ndarray]:
        """Like :meth:`_fast`, object by object, for whatever Detectron2's loaders take."""
        count = len(block)
        columns = {
            "annotation_id": np.full(count, -1, np.int64),
            "image": np.zeros(count, np.int64),
            "category": np.zeros(count, np.int64),
            "crowd": np.full(count, -1, np.int64),
            "box": np.zeros((count, 4)),
            "box_integer": np.zeros(count, np.uint8),
            **_no_masks(count),
        }
        keep = np.ones(count, dtype=bool)
        for i, obj in enumerate(block):
            needed = ("id", "image_id", "category_id", "bbox")
            if not isinstance(obj, dict) or any(field not in obj for field in needed):
                lacking = [f for f in needed if f not in obj] if isinstance(obj, dict) else "its fields"
                raise self._fail("annotations", obj, f"lacks {lacking}")
            name = f"{self.path}: annotation {obj['id']}"
            if obj.get("ignore", 0) != 0:
                raise ValueError(
                    f"{name} has 'ignore': {obj['ignore']!r}, which Detectron2 does not know. Remove the annotation, "
                    "or mark a crowd region by 'iscrowd': 1."
                )
            if type(obj["id"]) is int and abs(obj["id"]) < 2**62:
                columns["annotation_id"][i] = obj["id"]
            columns["image"][i] = self._code(obj["image_id"], "annotations")
            columns["category"][i] = self._code(obj["category_id"], "annotations")
            more = {}
            box = obj["bbox"]
            if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
                raise ValueError(f"{name} has bbox {str(box)[:100]}; a box is [x, y, width, height].")
            with contextlib.suppress(OverflowError):
                columns["box"][i] = box
            columns["box_integer"][i] = _integer_bits(box)[0]
            if any(type(v) is int and abs(v) > _EXACT for v in box):
                raise ValueError(f"{name} has bbox {str(box)[:100]}, far outside any image. Correct or remove it.")
            crowd = obj.get("iscrowd", -1)
            if type(crowd) is int and -1 < crowd < 2:
                columns["crowd"][i] = crowd
            elif "iscrowd" in obj:
                more["iscrowd"] = crowd
                columns["crowd"][i] = -1 if crowd == 0 else -2
            keypoints = obj.get("keypoints")
            if "keypoints" in obj:
                more["keypoints"] = keypoints
            if keypoints:
                if not (isinstance(keypoints, list) and all(type(v) in (int, float) for v in keypoints)):
                    raise ValueError(
                        f"{name} has keypoints {str(keypoints)[:100]}; a list [x, y, visibility, ...] is needed."
                    )
                # Keypoints are pixel indices and Detectron2's coordinates are continuous; visibility stays.
                more["keypoints"] = [v if k % 3 == 2 else v + 0.5 for k, v in enumerate(keypoints)]
                columns["visible_keypoints"][i] = sum(v > 0 for v in keypoints[2::3])
            for key in self._extra_keys:
                if key in obj:
                    more[key] = obj[key]
            keep[i] = self._one_mask(columns, i, obj, more)
        return {name: values[keep] for name, values in columns.items()}

    def _one_mask(self, columns: dict, i: int, obj: dict, more: dict) -> bool:
        """Keep the mask of one object and its further fields; False if Detectron2's loaders skip such an object."""
        name = f"{self.path}: annotation {obj['id']}"
        segmentation = obj.get("segmentation")
        columns["kind"][i] = SegmentKind.NONE
        if segmentation and isinstance(segmentation, dict):
            more |= self._rle_mask(name, segmentation)
            columns["rle_height"][i], columns["rle_width"][i] = segmentation["size"]
        elif segmentation:
            if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
                raise ValueError(
                    f"{name} has a segmentation that is neither polygons [[x, y, ...], ...] nor RLE "
                    f"{{'size': [height, width], 'counts': ...}}: {str(segmentation)[:100]}"
                )
            polygons = usable_polygons(segmentation)
            if not polygons:
                self._num_skipped += 1
                return False
            values = list(itertools.chain.from_iterable(polygons))
            types = set(map(type, values))
            if not types <= {int, float}:
                raise ValueError(
                    f"{name} has a polygon with something that is not a number: {str(polygons)[:100]}. Correct it."
                )
            try:
                numbers = np.array(values, dtype=np.float64)
            except OverflowError:
                numbers = np.array([np.inf])
            columns["reach"][i] = np.abs(numbers).max()  # NaN stays NaN
            if len(types) == 1 and (types == {float} or columns["reach"][i] <= _EXACT):
                columns["kind"][i] = SegmentKind.FLOATS if types == {float} else SegmentKind.INTEGERS
                self._add_parts(
                    columns, np.array([i]), numbers, np.array([*map(len, polygons)]), np.array([len(polygons)])
                )
            elif np.isfinite(numbers).all():
                columns["kind"][i] = SegmentKind.TEXT
                more["segmentation"] = polygons
                self._mark_long(
                    columns, np.array([i]), numbers, np.cumsum([*map(len, polygons)]), np.zeros(1, np.int64)
                )
        if more:
            text = self._dumps(more)
            columns["text_start"][i], columns["text_length"][i] = self._put_text(text), len(text)
        return True

    def _rle_mask(self, name: str, rle: dict) -> dict:
        size, counts = rle.get("size"), rle.get("counts")
        if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int and 0 < v < 2**31 for v in size)):
            raise ValueError(f"{name} has an RLE mask whose size is {size}; [height, width] is needed.")
        if isinstance(counts, str):
            if not counts.isascii():
                raise ValueError(f"{name} has an RLE mask whose counts have characters that are not ASCII. Correct it.")
            self._rle_texts.append((name, counts.encode("ascii"), size[0] * size[1]))
            return {"segmentation": rle}
        if not isinstance(counts, list) or not all(type(v) is int and 0 <= v < 2**32 for v in counts):
            raise ValueError(f"{name} has an RLE mask whose counts are neither a text nor whole numbers. Correct it.")
        if sum(counts) != size[0] * size[1]:
            raise ValueError(
                f"{name} has an RLE mask whose counts cover {sum(counts)} pixels of {size[0] * size[1]}. "
                "Correct or remove it."
            )
        compressed = mask_util.frPyObjects(rle, *size)
        return {"rle": [*compressed["size"], compressed["counts"].decode("ascii")]}

    # ---------------------------------------------------------------------------------------------------------- finish

    def finish(self, members: set[str]) -> tuple[dict[str, np.ndarray], dict]:
        path = self.path
        for name, elements in (("images", self._images), ("categories", self.categories)):
            if not elements:
                raise ValueError(
                    f"{path} has no {name}. An LVIS or COCO json has the members 'images', 'annotations' "
                    f"and 'categories'; this file has {sorted(members) or 'nothing'}."
                )
        categories, category_code = self._sorted_categories()
        images = _sorted_by_id(self._images, lambda image: image[0], path, "images")
        image_code = np.array([image[1] for image in images], dtype=np.int64)
        _refuse_twice(path, "images", image_code, [image[0] for image in images])
        size = np.array([image[2:4] for image in images], dtype=np.float64)

        blocks = {name: np.concatenate(self._blocks.pop(name)) for name in list(self._blocks)}
        if "image" not in blocks:
            blocks |= {name: values[:0] for name, values in self._slow([_NOTHING]).items()}
        blocks.setdefault("part_end", np.zeros(0, np.int64))
        ids = blocks["annotation_id"]
        image = self._positions(blocks.pop("image"), image_code, ids, "image_id", "images")
        category = self._positions(blocks.pop("category"), category_code, ids, "category_id", "categories")
        part_end = blocks.pop("part_end")
        order = np.argsort(image, kind="stable")
        o = {name: blocks.pop(name)[order] for name in list(blocks)}  # one at a time: they are large
        image, o["category"] = image[order], category[order].astype(np.int32)
        self._check_ids(o["annotation_id"])
        self._check_boxes(o, size[image])
        self._check_masks(o, size[image])
        # 0 and 1 stand for themselves, -1 for a field that is absent, -2 for another value than 0, kept as text.
        crowd = (o["crowd"] == 1) | (o["crowd"] == -2)
        center = (o["box"][:, :2] + o["box"][:, 2:] / 2) / size[image]
        center = np.clip(center, 0, np.nextafter(1, 0))
        arrays = {
            "image_size": size,
            "image_text_start": np.array([image[4] for image in images], dtype=np.int64),
            "image_text_length": np.array([image[5] for image in images], dtype=np.int32),
            "first": np.concatenate(([0], np.cumsum(np.bincount(image, minlength=len(images))))),
            "category": o["category"],
            "annotation_id": o["annotation_id"],
            "crowd": o["crowd"].astype(np.int8),
            "is_crowd": crowd,
            "box": o["box"],
            "box_integer": o["box_integer"],
            "kind": o["kind"],
            "part": o["part"],
            "part_count": o["part_count"],
            "part_end": part_end,
            "text_start": o["text_start"],
            "text_length": o["text_length"],
            "visible_keypoints": o["visible_keypoints"],
            "fractal_dimension": fractal_dimensions(center[~crowd], o["category"][~crowd], len(categories)),
        }
        low, high = o["box"][:, :2], o["box"][:, :2] + o["box"][:, 2:]
        empty = int((~(np.minimum(high, size[image]) > np.maximum(low, 0)).all(1) & ~crowd).sum())
        meta = {
            "categories": categories,
            "federated": self._federated,
            "has_annotations": "annotations" in members,
            "has_rle": bool((o["rle_height"] > 0).any()),
            "num_skipped": self._num_skipped,
            "num_empty_boxes": empty,
            "plain_json": self._plain_json,
        }
        if self._num_skipped:
            logger.warning(f"{path}: skipped {self._num_skipped} objects without a polygon of three points or more.")
        if empty:
            logger.warning(
                f"{path}: {empty} boxes have no width, no height or lie outside their image; training skips them."
            )
        return arrays, meta

    def _sorted_categories(self) -> tuple[list[dict], np.ndarray]:
        for category in self.categories:
            if not isinstance(category, dict) or "id" not in category or "name" not in category:
                raise ValueError(f"{self.path}: every category needs 'id' and 'name', found {str(category)[:200]}.")
        categories = _sorted_by_id(self.categories, operator.itemgetter("id"), self.path, "categories")
        code = np.array([self._code(c["id"], "categories") for c in categories], dtype=np.int64)
        _refuse_twice(self.path, "categories", code, [c["id"] for c in categories])
        return categories, code

    def _positions(self, codes: np.ndarray, listed: np.ndarray, ids: np.ndarray, field: str, member: str) -> np.ndarray:
        order = np.argsort(listed)
        at = np.minimum(np.searchsorted(listed[order], codes), len(listed) - 1)
        position = order[at]
        stray = listed[position] != codes
        if stray.any():
            names = {code: identifier for identifier, code in self._codes.items()}
            shown = [names.get(code, code) for code in np.unique(codes[stray])[:10].tolist()]
            raise ValueError(
                f"{self.path}: the {field} of {stray.sum()} annotations (ids {ids[stray][:10].tolist()}) is not among "
                f"the file's {member}: {shown}. Add these {member}, or remove the annotations."
            )
        return position

    def _check_ids(self, ids: np.ndarray) -> None:
        ids = np.sort(ids[ids != -1])
        twice = np.unique(ids[1:][np.diff(ids) == 0])
        if twice.size:
            # Seen in published data sets. Training does not look at these ids.
            logger.warning(
                f"{self.path}: ids occur more than once in 'annotations': {twice[:10].tolist()}. Evaluators that look "
                "annotations up by id will confuse them."
            )

    def _refuse(self, columns: dict, bad: np.ndarray, what: str) -> None:
        rows = np.flatnonzero(bad)
        if rows.size:
            shown = ", ".join(map(str, columns["annotation_id"][rows[:10]].tolist()))
            raise ValueError(
                f"{self.path}: {rows.size} annotations have {what}; their ids: {shown}"
                f"{' ...' if rows.size > 10 else ''}. Correct or remove them."
            )

    def _check_boxes(self, columns: dict, size: np.ndarray) -> None:
        box = columns["box"]
        self._refuse(columns, ~np.isfinite(box).all(1), "a box with a number that is not finite")
        self._refuse(columns, (box[:, 2:] < 0).any(1), "a box of negative width or height")

    def _check_masks(self, columns: dict, size: np.ndarray) -> None:
        reach, limit = columns["reach"], REACH * size.max(1)
        self._refuse(columns, ~np.isfinite(reach), "a polygon with a number that is not finite")
        self._refuse(columns, reach > limit, f"a polygon that reaches beyond {REACH} times the size of its image")
        self._refuse(columns, columns["long"], f"an outline longer than {MAX_OUTLINE:,} pixels")
        rle = columns["rle_height"] > 0
        other = rle & ((columns["rle_width"] != size[:, 0]) | (columns["rle_height"] != size[:, 1]))
        self._refuse(columns, other, "an RLE mask whose size is not that of its image")


def _no_masks(count: int) -> dict[str, np.ndarray]:
    return {
        "kind": np.full(count, _UNDECIDED, np.uint8),
        "part": np.zeros(count, np.int64),
        "part_count": np.zeros(count, np.int32),
        "text_start": np.zeros(count, np.int64),
        "text_length": np.zeros(count, np.int32),
        "visible_keypoints": np.zeros(count, np.int32),
        "long": np.zeros(count, bool),
        "reach": np.zeros(count),  # largest absolute coordinate of the polygons
        "rle_height": np.zeros(count, np.int32),
        "rle_width": np.zeros(count, np.int32),
    }


def _integer_bits(flat: Sequence[int | float]) -> np.ndarray:
    """Bit k of entry i says whether number 4 i + k is an integer."""
    if set(map(type, flat)) == {float}:
        return np.zeros(len(flat) // 4, np.uint8)
    integer = np.fromiter((type(v) is int for v in flat), np.uint8, len(flat)).reshape(-1, 4)
    return integer @ np.array([1, 2, 4, 8], np.uint8)


def _sorted_by_id(elements: list, identifier: Callable, path: str, member: str) -> list:
    try:
        return sorted(elements, key=identifier)
    except TypeError as error:
        raise ValueError(f"{path}: the ids in {member!r} are of different types ({error}).") from error


def _refuse_twice(path: str, member: str, codes: np.ndarray, ids: list) -> None:
    _, index, number = np.unique(codes, return_index=True, return_counts=True)
    if (number > 1).any():
        raise ValueError(f"{path}: ids occur more than once in {member!r}: {[ids[i] for i in index[number > 1][:10]]}.")
