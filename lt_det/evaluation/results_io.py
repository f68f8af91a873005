"""Reading the results of any model, in parts of bounded size."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .json_window import JsonWindow, parse_json
from .rle import RleTable, encode_segmentations

__all__ = ["ResultPart", "read_results", "results_from_dicts"]

_ROWS = 1 << 17  # results a part
_WORTH_TWO_THREADS = 1 << 20  # bytes
_BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*(?=\{)")


@dataclass
class ResultPart:
    """n results in file order.

    Attributes:
        image_id, category_id (n,) int64; score (n,) float64, NaN where missing; boxes (n, 4) float64 x, y,
        width, height.
        fields (n,) uint8: which of image_id (1), category_id (2), score (4), bbox (8) and segmentation (16)
        a result has.
        masks: n encodings, empty strings where there is none.
        polygons: rows whose segmentation is polygons, to be rasterised once the image size is known.
    """

    image_id: np.ndarray
    category_id: np.ndarray
    score: np.ndarray
    boxes: np.ndarray
    fields: np.ndarray
    masks: RleTable
    polygons: dict[int, Any]

    def __len__(self) -> int:
        return len(self.score)


def read_results(
    path: str | os.PathLike, *, category_ids: Sequence[int] | None = None, progress: bool = True
) -> Iterator[ResultPart]:
    """Reads a results file: COCO/LVIS results json (Detectron2, mmdetection and others write it; gzip too),
    or Detectron2's
    ``instances_predictions.pth``.

    Args:
        path: the file.
        category_ids: dataset ids by class index, which a ``.pth`` needs: Detectron2 writes class indices
        there.
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
    from tqdm import tqdm

    total = os.path.getsize(path)
    with tqdm(total=total, unit="B", unit_scale=True, desc=os.path.basename(path), disable=not progress) as bar:
        with JsonWindow(path, on_progress=bar.update) as window:
            yield from _read_json(window)


def _read_json(window: JsonWindow) -> Iterator[ResultPart]:
    first = window.peek()
    if first != "[":
        kind = {"{": "an object (an annotation file?)", "": "nothing"}.get(first, repr(first))
        raise ValueError(
            f"{window.path} holds {kind}; results are a list of "
            '{"image_id", "category_id", "score", "bbox" and/or "segmentation"}.'
        )
    window.pos += 1
    closed = False
    first_element = True
    with ThreadPoolExecutor(1, thread_name_prefix="lt_det_parse") as pool:
        while not closed:
            text = window.text
            half = _second_half(text, window.pos)
            parsed = []
            if half:
                # Most likely an object begins there. It does if the first half ends right before it.
                ahead = pool.submit(_Rows, text, half, True)
                first, second = _Rows(text[:half], window.pos, first_element), ahead.result()
                if first.count:
                    parsed = [first, second] if second.count and first.leads_to(text, half) else [first]
            if not parsed:
                parsed = [_Rows(text, window.pos, first_element)]
            closed = parsed[-1].closed
            window.pos = parsed[-1].position
            if not closed and not sum(rows.count for rows in parsed):
                shown = text[window.pos : window.pos + 40].tobytes().decode("utf-8", "replace")
                if parsed[-1].malformed:
                    raise window.fail(f"results are objects with commas between, found {shown!r}")
                if window.at_end:
                    raise window.fail("it ends inside of the list of results; the file is cut off")
                window.grow()
                continue
            first_element = False
            for rows in parsed:
                yield rows.part(text, window)


def _second_half(text: np.ndarray, position: int) -> int:
    """A place near the middle of text[position:] where an object seems to begin; 0: none, or not worth it."""
    if len(text) - position < _WORTH_TWO_THREADS:
        return 0
    middle = (position + len(text)) // 2
    found = _BETWEEN_OBJECTS.search(text[middle : middle + (1 << 16)].tobytes())
    return middle + found.end() if found else 0


class _Rows:
    """What ``parse_results`` finds in a text from a place on; parsing does not hold the GIL."""

    def __init__(self, text: np.ndarray, position: int, first_element: bool):
        from ._json_kernels import parse_results

        n = _ROWS
        self._fields = np.zeros(n, np.uint8)
        self._image, self._category, self._begin, self._end = (np.zeros(n, np.int64) for _ in range(4))
        self._object = np.zeros(n, np.int64), np.zeros(n, np.int64)  # begin and end
        self._score = np.full(n, np.nan)
        self._boxes, self._size = np.zeros((n, 4)), np.zeros((n, 2), np.int64)
        self.count, self.position, self.closed, self.malformed = parse_results(
            text, position, first_element,
            self._fields, self._image, self._category, self._score, self._boxes,
            self._begin, self._end, self._size, *self._object,
        )  # fmt: skip

    def leads_to(self, text: np.ndarray, place: int) -> bool:
        """Whether nothing but a comma stands between the last object and ``place``."""
        between = text[self.position : place].tobytes()
        return not self.closed and len(between) < 100 and between.strip() == b","

    def part(self, text: np.ndarray, window: JsonWindow) -> ResultPart:
        from ._json_kernels import unescape

        rows = slice(self.count)
        unescape(text, self._begin[rows], self._end[rows])
        part = ResultPart(
            self._image[rows], self._category[rows], self._score[rows], self._boxes[rows], self._fields[rows],
            RleTable(text, self._begin[rows], self._end[rows], self._size[rows]), {},
        )  # fmt: skip
        odd = np.flatnonzero(part.fields == 0)
        if len(odd):
            objects = []
            for i in odd:
                data = text[self._object[0][i] : self._object[1][i]].tobytes()
                try:
                    objects.append(parse_json(data))
                except ValueError as error:
                    raise window.fail(f"{error} in {data[:80].decode('utf-8', 'replace')!r}") from error
            _fill(part, odd, objects)
        return part


def results_from_dicts(results: Sequence[dict[str, Any]]) -> ResultPart:
    """Results in memory as one part."""
    n = len(results)
    part = ResultPart(
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
        np.full(n, np.nan),
        np.zeros((n, 4)),
        np.zeros(n, np.uint8),
        RleTable(np.zeros(0, np.uint8), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 2), np.int64)),
        {},
    )
    _fill(part, np.arange(n), results)
    return part


def _fill(part: ResultPart, rows: np.ndarray, results: Sequence[Any]) -> None:
    """Writes ``results``, parsed, to ``rows`` of ``part``; what has the wrong type counts as missing."""
    strings: list[bytes] = []
    where: list[int] = []
    for i, result in zip(rows.tolist(), results):
        fields = 0
        if not isinstance(result, dict):
            result = {}
        for bit, name, column in ((1, "image_id", part.image_id), (2, "category_id", part.category_id)):
            value = result.get(name)
            if isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer()):
                column[i] = int(value)
                fields |= bit
        score = result.get("score")
        if isinstance(score, (int, float, np.floating, np.integer)):
            part.score[i] = score
            fields |= 4
        try:
            box = np.asarray(result["bbox"], np.float64)
            if box.shape == (4,):
                part.boxes[i] = box
                fields |= 8
        except (KeyError, TypeError, ValueError):
            fields &= ~8  # no box, or not four numbers: reported as missing
        mask = result.get("segmentation")
        if isinstance(mask, list) and mask:
            part.polygons[i] = mask
            fields |= 16
        elif isinstance(mask, dict) and len(mask.get("size", ())) == 2:
            counts = mask.get("counts")
            if isinstance(counts, list):
                table = encode_segmentations([mask], np.array([mask["size"]]))
                counts = table.strings()[0]
            if isinstance(counts, (str, bytes)):
                strings.append(counts.encode("utf-8") if isinstance(counts, str) else counts)
                where.append(i)
                part.masks.size[i] = mask["size"]
                fields |= 16
        part.fields[i] = fields
    if strings:
        more = RleTable.from_strings(strings, part.masks.size[where])
        part.masks.begin[where] = more.begin + len(part.masks.text)
        part.masks.end[where] = more.end + len(part.masks.text)
        part.masks.text = np.concatenate([part.masks.text, more.text])


def _read_pth(path: str, category_ids: Sequence[int] | None) -> Iterator[ResultPart]:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, list) or (content and "instances" not in content[0]):
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
