"""Reading the results of any model, in parts of bounded size."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from lt_det.io.json_blocks import first_character, iter_json_list
from lt_det.io.results import BOX, CATEGORY, IMAGE, MASK, SCORE, UNCERTAIN, scan_results
from lt_det.processes import usable_cores
from lt_det.progress import progress_bar

from .rle import RleTable

__all__ = ["ResultPart", "read_results", "results_from_dicts"]

_NUM_THREADS = min(usable_cores(), 4)  # that parse, of what a file system delivers


@dataclass
class ResultPart:
    """n results in file order.

    Attributes:
        image_id, category_id (n,) int64; score (n,) float64, NaN where missing; boxes (n, 4) float64 x, y,
            width, height.
        fields (n,) uint8: which of image_id (1), category_id (2), score (4), bbox (8) and segmentation (16) a
            result has.
        masks: n compressed run lengths, empty strings where there are none.
        shapes: by row, segmentations of other forms (polygons, uncompressed run lengths, or what is neither), to
            be encoded once the image size is known.
    """

    image_id: np.ndarray
    category_id: np.ndarray
    score: np.ndarray
    boxes: np.ndarray
    fields: np.ndarray
    masks: RleTable
    shapes: dict[int, Any]

    def __len__(self) -> int:
        return len(self.score)


def read_results(
    path: str | os.PathLike, *, category_ids: Sequence[int] | None = None, progress: bool = True
) -> Iterator[ResultPart]:
    """Reads a results file: COCO/LVIS results json (Detectron2, mmdetection and others write it; gzip too), or
    Detectron2's ``instances_predictions.pth``.

    Args:
        path: the file.
        category_ids: dataset ids by class index, which a ``.pth`` needs: Detectron2 writes class indices there.
        progress: show a progress bar.

    Raises:
        ValueError: the file is none of these; the message says what was found.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no results file {path}.")
    if path.endswith((".pth", ".pt")):
        yield from _read_pth(path, category_ids)
        return
    first = first_character(path)
    if first != "[":
        kind = {"{": "an object (an annotation file?)", "": "nothing"}.get(first, repr(first))
        raise ValueError(
            f"{path} holds {kind}; results are a list of "
            '{"image_id", "category_id", "score", "bbox" and/or "segmentation"}.'
        )
    total = os.path.getsize(path)
    with progress_bar(total=total, unit="B", unit_scale=True, desc=os.path.basename(path), show=progress) as bar:
        on_read = lambda data: bar.update(len(data))
        for parts in iter_json_list(path, _read_block, on_read=on_read, num_threads=_NUM_THREADS):
            yield from parts


def _read_block(block: bytes) -> list[ResultPart]:
    """The results of one piece of a file, ``[{..}, ..]``.

    Raises:
        ValueError: it is not valid json.
    """
    part = _scan(block)
    return [part if part is not None else results_from_dicts(_parse(block))]


def _scan(block: bytes) -> ResultPart | None:
    """Usual results; None where anything else is among them."""
    r = scan_results(block)
    if r is None:
        return None
    begin = np.concatenate([[0], r.end[:-1]]).astype(np.int64)
    part = ResultPart(r.image, r.category, r.score, r.boxes, r.fields, RleTable(r.masks, begin, r.end, r.size), {})
    for i in np.flatnonzero(r.fields & UNCERTAIN).tolist():
        result = r.element(i)
        part.fields[i] -= UNCERTAIN
        part.score[i] = _as_float(result.get("score", np.nan))
        part.boxes[i] = [_as_float(v) for v in result.get("bbox", np.zeros(4))]
    return part


def _parse(block: bytes) -> list:
    try:
        return msgspec.json.decode(block)
    except msgspec.DecodeError:
        return json.loads(block)  # which knows NaN and Infinity too


def results_from_dicts(results: Sequence[Any]) -> ResultPart:
    """Results in memory as one part; what has the wrong type counts as missing."""
    n = len(results)
    part = ResultPart(
        np.zeros(n, np.int64), np.zeros(n, np.int64), np.full(n, np.nan), np.zeros((n, 4)), np.zeros(n, np.uint8),
        RleTable.without_masks(n), {},
    )  # fmt: skip
    texts, where = [], []
    for i, result in enumerate(results):
        if not isinstance(result, dict):
            continue
        fields = 0
        for bit, name, column in ((IMAGE, "image_id", part.image_id), (CATEGORY, "category_id", part.category_id)):
            value = result.get(name)
            if _is_number(value) and abs(value) < 2**63 and value == int(value):
                column[i] = int(value)
                fields |= bit
        score = result.get("score")
        if _is_number(score):
            part.score[i] = _as_float(score)
            fields |= SCORE
        box = result.get("bbox")
        if isinstance(box, (list, tuple, np.ndarray)) and len(box) == 4 and all(map(_is_number, box)):
            part.boxes[i] = [_as_float(v) for v in box]
            fields |= BOX
        mask = result.get("segmentation")
        if isinstance(mask, (list, dict)) and mask:
            fields |= MASK
            counts, size = (mask.get("counts"), mask.get("size")) if isinstance(mask, dict) else (None, None)
            if isinstance(counts, (str, bytes)) and counts.isascii() and _is_size(size):
                texts.append(counts.encode("ascii") if isinstance(counts, str) else counts)
                where.append(i)
                part.masks.size[i] = size
            else:
                part.shapes[i] = mask
        elif mask is not None and not isinstance(mask, (list, dict)):
            fields |= MASK
            part.shapes[i] = mask
        part.fields[i] = fields
    if texts:
        strings = RleTable.from_strings(texts, part.masks.size[where])
        part.masks.text, part.masks.begin[where], part.masks.end[where] = strings.text, strings.begin, strings.end
    return part


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return float("inf")


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, (list, tuple))
        and len(size) == 2
        and all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and abs(v) < 2**31 for v in size)
    )


def _read_pth(path: str, category_ids: Sequence[int] | None) -> Iterator[ResultPart]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        # torch's own advice is to load with weights_only=False, which runs what the file says.
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged or cut off, or holds more than numbers, "
            "texts, lists and dicts, which could run code and is not read. Write the results anew, or as json."
        ) from None
    if not isinstance(content, list) or not all(isinstance(i, dict) and "instances" in i for i in content):
        raise ValueError(
            f"{path} is not an instances_predictions.pth of Detectron2: a list of {{'image_id', 'instances'}}."
        )
    ids = np.asarray(category_ids, np.int64)
    for begin in range(0, len(content), 512):
        results = [r for image in content[begin : begin + 512] for r in image["instances"]]
        part = results_from_dicts(results)
        # Detectron2 writes class indices here; what is not one stays unknown, to be reported.
        known = (part.category_id >= 0) & (part.category_id < len(ids))
        part.category_id = np.where(known, ids[np.where(known, part.category_id, 0)], -1)
        yield part
