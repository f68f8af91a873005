"""Evaluation of a results file, or of results in memory, of any model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_det.progress import progress_bar

from .ground_truth import GroundTruth, rank_table
from .matching import IOU_TYPES, Matches, match_detections, of_cells, ranges
from .metrics import Accumulated, add_cell_caps, summarize
from .results_io import BOX, CATEGORY, IMAGE, MASK, SCORE, ResultPart, read_results, results_from_dicts
from .rle import RleTable, encode_segmentations

__all__ = ["Evaluation", "InvalidResultsError", "evaluate_results"]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 15  # detections matched at a time, in whole images
_MASKS_IN_MEMORY = 1 << 29  # bytes of mask strings; more go to a temporary file
_AHEAD = 3  # parts of a file that are parsed ahead
_PROBLEMS = (  # the first ten in the order of check_results
    "none", "no image_id", "no category_id", "no score", "unknown image_id", "unknown category_id",
    "score is not finite", "bbox is not finite", "no bbox", "no segmentation",
    "mask size is not the image's", "neither bbox nor segmentation",
)  # fmt: skip


class InvalidResultsError(ValueError):
    """A results file has entries that cannot be evaluated; ``problems`` counts them by kind."""

    def __init__(self, message: str, problems: dict[str, int]):
        super().__init__(message)
        self.problems = problems


@dataclass
class Evaluation:
    """Result of :func:`evaluate_results`.

    Attributes:
        metrics: percent by IoU type, NaN where there is nothing to average.
        curves: by IoU type what they come from, "main" and maybe "fixed".
        matches: match flags by IoU type.
        num_results: number of results read, the skipped ones included.
        problems: number of skipped results by kind.
    """

    gt: GroundTruth
    metrics: OrderedDict[str, OrderedDict[str, float]]
    curves: dict[str, dict[str, Accumulated]]
    matches: dict[str, Matches]
    num_results: int
    problems: dict[str, int]

    def save(self, output_dir: str, *, plots: bool = True) -> None:
        """Writes metrics.json, per_category.csv, matches_<type>.npz and plots."""
        from .report import save_report

        save_report(output_dir, self.gt, self.metrics, self.details(), plots=plots)

    def details(self) -> dict[str, dict[str, Any]]:
        return {task: {**curves, "matches": self.matches[task]} for task, curves in self.curves.items()}


def evaluate_results(
    gt: GroundTruth,
    results: str | os.PathLike | Sequence[dict[str, Any]],
    *,
    iou_types: Sequence[str] | None = None,
    max_dets: int | None = None,
    ap_fixed: bool = False,
    detections_per_category: int = 10000,
    segm_area: str = "official",
    skip_invalid: bool = False,
    boundary_dilation_ratio: float = 0.02,
    num_threads: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates results as the LVIS API would (COCO ground truth: as pycocotools).

    Args:
        gt: ground truth, with masks where ``iou_types`` has "segm" or "boundary".
        results: path of a results file (see :func:`lt_det.evaluation.read_results`), or a list of result dicts.
        iou_types: of "bbox", "segm", "boundary"; None: what the first result carries.
        max_dets: detections an image (LVIS, default 300), or an image and category (COCO, default 100).
        ap_fixed: add AP-fixed and AP-pool with ``detections_per_category`` over the data set and no cap by image.
        segm_area: what sorts a detected mask into small, medium, large, and drops it when 0. "official": the rule of
            the official API, the box's area when the results carry boxes, else the mask's; or "mask" (Detectron2's
            evaluator), or "box".
        skip_invalid: leave out results that cannot be evaluated; otherwise they raise.
        num_threads: for matching; by default the number of processors, at most 8.
        progress: show progress bars.

    Raises:
        InvalidResultsError: results that cannot be evaluated, counted by kind.
        ValueError: an argument is wrong, or the file is not a results file.
    """
    parts, source = parts_of(results, gt, progress)
    collector = ResultCollector(gt, iou_types, segm_area, source=source)
    for part in _read_ahead(parts):
        collector.add(part)
    collector.check(skip_invalid)
    if not collector.num_results:
        logger.warning("%s holds no results: every annotation counts as missed.", source)
    max_dets = max_dets or (300 if gt.federated else 100)
    matches = collector.match(
        max_dets=max_dets,
        per_category=detections_per_category if ap_fixed else None,
        boundary_ratio=boundary_dilation_ratio,
        num_threads=num_threads or min(os.cpu_count() or 1, 8),
        progress=progress,
    )
    metrics: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()
    curves = {}
    for task in collector.iou_types:
        metrics[task], curves[task] = summarize(gt, matches[task], max_dets)
    return Evaluation(gt, metrics, curves, matches, collector.num_results, dict(collector.problems))


def parts_of(results, gt: GroundTruth, progress: bool) -> tuple[Iterable[ResultPart], str]:
    """Results in parts, and what messages call them: a path, or dicts in memory."""
    if isinstance(results, (str, os.PathLike)):
        return read_results(results, category_ids=gt.category_ids, progress=progress), os.fspath(results)
    return [results_from_dicts(results)], "the results"


def _read_ahead(parts: Iterable[ResultPart]) -> Iterator[ResultPart]:
    """The next parts are parsed, without the GIL, while the caller works on this one."""
    iterator = iter(parts)
    with ThreadPoolExecutor(1, thread_name_prefix="lt_det_read") as pool:
        ahead = deque(pool.submit(next, iterator, None) for _ in range(_AHEAD))
        while (part := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, iterator, None))
            yield part


class ResultCollector:
    """Takes results in parts and keeps what the metrics need.

    Of every result: image, category, score (16 bytes), for the caps. Of results that count, box and area; of those that
    may match an annotation, the mask string.
    """

    def __init__(
        self,
        gt: GroundTruth,
        iou_types: Sequence[str] | None,
        segm_area: str = "official",
        *,
        all_masks: bool = False,
        source: str = "the results",
    ):
        """
        Args:
            all_masks: keep the masks of all results that count, not only of those that may match an annotation of their
                category.
        """
        if segm_area not in ("official", "mask", "box"):
            raise ValueError(f"segm_area is {segm_area!r}; it must be 'official', 'mask' or 'box'.")
        if iou_types is not None and (not iou_types or set(iou_types) - set(IOU_TYPES)):
            raise ValueError(f"iou_types is {tuple(iou_types)}; choose of 'bbox', 'segm', 'boundary'.")
        self.gt, self.source = gt, source
        self.iou_types = tuple(iou_types) if iou_types is not None else ()
        self._choose_types = iou_types is None
        self._segm_area = segm_area
        self._all_masks = all_masks
        self.num_results = 0
        self.problems: OrderedDict[str, int] = OrderedDict()
        self._examples: dict[str, str] = {}
        self._unknown_categories: set = set()
        self._carries: int | None = None  # fields of the first result
        self._log: list[tuple] = []
        self._kept: list[dict[str, np.ndarray]] = []
        self._spool = MaskSpool()
        self._image_table, self._category_table = rank_table(gt.image_ids), rank_table(gt.category_ids)

    @property
    def _needs_masks(self) -> bool:
        return any(t != "bbox" for t in self.iou_types) or not self._carries & BOX

    def _begin(self, fields: int) -> None:
        """Settles what the file is from its first result, as the official API does."""
        self._carries = fields
        if self._choose_types:
            self.iou_types = (("bbox",) if fields & BOX else ()) + (("segm",) if fields & MASK else ())
            if not self.iou_types:
                raise ValueError(f"{self.source}: the first result has neither 'bbox' nor 'segmentation'. Correct it.")
        wants_masks = [t for t in self.iou_types if t != "bbox"]
        if wants_masks and self.gt.masks is None:
            raise ValueError(f"{wants_masks} needs masks, and the ground truth was loaded without (with_masks=False).")
        if wants_masks and not fields & MASK:
            logger.warning("The results have no masks: boxes serve as masks, as in the official API.")
        if self._segm_area == "official":
            self._segm_area = "box" if fields & BOX else "mask"
        elif self._segm_area == "box" and not fields & BOX and wants_masks:
            raise ValueError(f"segm_area is 'box', and {self.source} carries no boxes.")

    def add(self, part: ResultPart) -> None:
        from . import _match_kernels as kernels

        if not len(part):
            return
        if self._carries is None:
            self._begin(int(part.fields[0]))
        gt = self.gt
        image, category, good = self._check_fields(part)
        cell = kernels.find_cells(image, category, gt.cell_start, gt.cell_category, gt.num_categories)
        kept = np.flatnonzero(cell >= 0 if gt.federated else good)
        columns: dict[str, np.ndarray] = {"row": self.num_results + kept, "cell": cell[kept]}
        if self._needs_masks:
            table, problems = self._tables(part, kept, image)
            intact, columns["mask_area"] = self._check_masks(part, kept, table, gt.image_sizes[image[kept]], problems)
        else:
            table, intact = None, np.ones(len(kept), bool)
        if self._carries & BOX:
            columns["boxes"] = part.boxes[kept]
        elif "bbox" in self.iou_types:
            boxes = part.boxes[kept]
            missing = (part.fields[kept] & BOX) == 0
            rows = np.flatnonzero(missing & intact)
            boxes[rows] = self._boxes_of(table.take(rows), gt.image_sizes[image[kept[rows]], 0])
            columns["boxes"] = boxes
        if not intact.all():
            image[kept[~intact]] = category[kept[~intact]] = -1
            columns = {name: values[intact] for name, values in columns.items()}
        if any(t != "bbox" for t in self.iou_types):
            mask_row = np.full(len(columns["row"]), -1, np.int64)
            useful = np.flatnonzero(self._all_masks | (of_cells(gt.cell_num_gt, columns["cell"]) > 0))
            mask_row[useful] = self._spool.add(table.take(np.flatnonzero(intact)[useful]))
            columns["mask"] = mask_row
        self._kept.append(columns)
        self._log.append((image, category, part.score.copy()))
        self.num_results += len(part)

    # ---------------------------------------------------------------- checks

    def _report(self, kind: str, bad: np.ndarray, part: ResultPart) -> None:
        self.problems[kind] = self.problems.get(kind, 0) + int(bad.sum())
        if kind not in self._examples:
            i = int(np.flatnonzero(bad)[0])
            self._examples[kind] = (
                f"result {self.num_results + i}: image_id {part.image_id[i] if part.fields[i] & IMAGE else None}, "
                f"category_id {part.category_id[i] if part.fields[i] & CATEGORY else None}, score {part.score[i]}"
            )

    def _check_fields(self, part: ResultPart) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks of images and categories (n,) int32, and (n,) whether a result can be evaluated.

        The ranks are -1 where it cannot, so that rows of the file and of the log stay the same. A bad one is
        counted once, under its first problem.
        """
        from ._match_kernels import check_results

        gt = self.gt
        image, category = np.empty((2, len(part)), np.int32)
        problem = np.empty(len(part), np.uint8)
        masks = bool(self._carries & MASK) and self._needs_masks
        required = IMAGE | CATEGORY | SCORE | (self._carries & BOX) | (MASK if masks else 0)
        check_results(
            part.image_id, part.category_id, part.fields, part.score, part.boxes,
            gt.image_ids, self._image_table, gt.category_ids, self._category_table, required,
            image, category, problem,
        )  # fmt: skip
        if masks:
            stated = (part.fields & MASK) != 0
            stated[list(part.shapes)] = False
            wrong = stated & (part.masks.size != gt.image_sizes[np.maximum(image, 0)]).any(1)
            problem[wrong & (problem == 0)] = 10
        elif not self._carries & (BOX | MASK):
            problem[((part.fields & (BOX | MASK)) == 0) & (problem == 0)] = 11
        good = problem == 0
        if not good.all():
            for code in np.unique(problem[~good]).tolist():
                bad = problem == code
                self._report(_PROBLEMS[code], bad, part)
                if _PROBLEMS[code] == "unknown category_id":
                    self._unknown_categories.update(np.unique(part.category_id[bad])[:1000].tolist())
            image[~good] = category[~good] = -1
        return image, category, good

    def _check_masks(
        self, part: ResultPart, kept: np.ndarray, table: RleTable, size: np.ndarray, problems: dict[int, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(m,) whether the run lengths cover the image exactly, and (m,) areas. ``problems``: of those that could not
        be encoded."""
        area, total = table.areas_and_totals()
        broken = total != size[:, 0] * size[:, 1]
        kinds = dict.fromkeys(np.flatnonzero(broken).tolist(), "run lengths do not cover the image") | problems
        for kind in dict.fromkeys(kinds.values()):
            bad = np.zeros(len(part), bool)
            bad[[kept[k] for k, of in kinds.items() if of == kind]] = True
            self._report(kind, bad, part)
        return ~broken, area.astype(np.float64)

    def check(self, skip_invalid: bool) -> None:
        """Raises, or with ``skip_invalid`` warns, about what could not be evaluated."""
        if not self.problems:
            return
        lines = [f"  {count} x {kind} ({self._examples[kind]})" for kind, count in self.problems.items()]
        hint = ""
        ids = self.gt.category_ids
        if self._unknown_categories == {0} and len(ids) and ids[0] == 1:
            hint = (
                "\nCategory ids look zero-based: the file has 0, and the annotations count from 1. Map "
                "class indices to "
                "category ids before writing."
            )
        total = sum(self.problems.values())
        text = (
            f"{total} of {self.num_results} results of {self.source} cannot be evaluated:\n" + "\n".join(lines) + hint
        )
        if not skip_invalid:
            raise InvalidResultsError(
                f"{text}\nCorrect them, or leave them out with skip_invalid (--skip-invalid).", self.problems
            )
        logger.warning("%s\nThey are left out.", text)

    # ---------------------------------------------------------------- masks

    def _tables(self, part: ResultPart, kept: np.ndarray, image: np.ndarray) -> tuple[RleTable, dict[int, str]]:
        """Encodings of ``kept``, and what is wrong with those that have none; polygons, and boxes where masks are
        missing, are rasterised."""
        table = part.masks.take(kept)
        size = self.gt.image_sizes[image[kept]]
        shapes: dict[int, Any] = {}
        if part.shapes:
            shapes.update({k: part.shapes[i] for k, i in enumerate(kept.tolist()) if i in part.shapes})
        for k in np.flatnonzero((part.fields[kept] & MASK) == 0).tolist():
            x, y, w, h = part.boxes[kept[k]].tolist()
            x2, y2 = x + w, y + h
            shapes[k] = [[x, y, x, y2, x2, y2, x2, y]]
        problems: dict[int, str] = {}
        if shapes:
            where = np.array(list(shapes))
            more, wrong = encode_segmentations(list(shapes.values()), size[where])
            problems = {int(where[k]): problem for k, problem in wrong.items()}
            both = RleTable.concatenate([table, more])
            index = np.arange(len(kept))
            index[where] = len(kept) + np.arange(len(where))
            table = both.take(index)
        return table, problems

    @staticmethod
    def _boxes_of(table: RleTable, height: np.ndarray) -> np.ndarray:
        from ._rle_kernels import bounding_boxes

        return bounding_boxes(*table.counts(), np.ascontiguousarray(height)).astype(np.float64)

    # ---------------------------------------------------------------- matching

    def match(
        self,
        *,
        max_dets: int,
        per_category: int | None,
        boundary_ratio: float,
        num_threads: int,
        progress: bool,
    ) -> dict[str, Matches]:
        """Matches all that was added; frees it."""
        from . import _match_kernels as kernels

        gt = self.gt
        caps_names = (("image",) if gt.federated else ()) + (("category",) if per_category else ())
        if self._carries is None or not self._kept:
            self.iou_types = self.iou_types or ("bbox",)
            empty = {task: Matches.empty(caps_names) for task in self.iou_types}
            for matches in empty.values():
                if not gt.federated:
                    add_cell_caps(matches, max_dets)
            return empty
        image, category, score = (np.concatenate(c) for c in zip(*self._log))
        self._log = []
        kept = {name: np.concatenate([k[name] for k in self._kept]) for name in self._kept[0]}
        self._kept = []
        row = kept.pop("row")
        caps = {}
        if gt.federated:
            caps["image"] = _within(image, gt.num_images, score, max_dets, row)
        if per_category:
            caps["category"] = _within(category, gt.num_categories, score, per_category, row)
        image, category, score = image[row], category[row], score[row]
        masks = self._spool.finish()
        box_area = kept["boxes"][:, 2] * kept["boxes"][:, 3] if "boxes" in kept else None
        mask_area = kept.get("mask_area")
        area = {
            "bbox": box_area if self._carries & BOX else mask_area,
            "segm": box_area if self._segm_area == "box" else mask_area,
        }
        order, start = kernels.group_order(image.astype(np.int64), gt.num_images)
        out: dict[str, Matches] = {}
        for task in self.iou_types:
            blocks = _blocks(start)

            def work(block, task=task):
                index = order[block[0] : block[1]]
                part: dict[str, Any] = {}
                if task == "bbox":
                    part["boxes"] = kept["boxes"][index]
                else:
                    # Rows without a mask are in cells without annotations: nothing looks at them.
                    part["masks"] = masks.take(np.maximum(kept["mask"][index], 0)) if len(masks) else masks
                return match_detections(
                    gt,
                    task,
                    image=image[index],
                    category=category[index],
                    score=score[index],
                    area=area["bbox" if task == "bbox" else "segm"][index],
                    caps={name: flags[index] for name, flags in caps.items()},
                    cell=kept["cell"][index],
                    boundary_ratio=boundary_ratio,
                    **part,
                )

            bar = progress_bar(total=len(order), unit="det", unit_scale=True, desc=f"matching {task}", show=progress)
            parts = []
            with ThreadPoolExecutor(num_threads) as pool, bar:
                for block, matches in zip(blocks, pool.map(work, blocks)):
                    parts.append(matches)
                    bar.update(block[1] - block[0])
            out[task] = Matches.concatenate(parts) if parts else Matches.empty(caps_names)
            if not gt.federated:
                add_cell_caps(out[task], max_dets)
        return out


def _within(group: np.ndarray, num_groups: int, score: np.ndarray, limit: int, rows: np.ndarray) -> np.ndarray:
    """Whether each of ``rows`` is among the ``limit`` best of its group; earlier rows win ties. Group -1: in
    none."""
    from . import _match_kernels as kernels

    inside = group >= 0
    crowded = np.bincount(group + 1, minlength=num_groups + 1) > limit
    crowded[0] = False
    if crowded.any():  # the order inside of the other groups does not matter
        index = np.flatnonzero(crowded[group + 1])
        order, start = kernels.group_order(group[index].astype(np.int64), num_groups)
        kernels.sort_groups(order, start, score[index])
        inside[index] = False
        inside[index[order[ranges(start[:-1], np.minimum(np.diff(start), limit))]]] = True
    return inside[rows]


def _blocks(start: np.ndarray) -> list[tuple]:
    """Ranges of about ``_BLOCK`` detections that end with an image."""
    out, begin, total = [], 0, int(start[-1])
    while begin < total:
        end = int(start[min(np.searchsorted(start, begin + _BLOCK), len(start) - 1)])
        out.append((begin, end))
        begin = end
    return out


class MaskSpool:
    """Mask strings in memory, or in a temporary file when they are many."""

    def __init__(self, limit: int = _MASKS_IN_MEMORY):
        self._limit = limit
        self._parts: list[np.ndarray] = []
        self._bytes = 0
        self._file = None
        self._flushed = 0
        self._length: list[np.ndarray] = []
        self._rows = 0

    def add(self, table: RleTable) -> np.ndarray:
        """Adds masks; their row numbers."""
        length = table.end - table.begin
        self._parts.append(table.text[ranges(table.begin, length)])
        self._length.append(length)
        self._bytes += int(length.sum())
        if self._bytes > self._limit:
            self._flush()
        first = self._rows
        self._rows += len(table)
        return np.arange(first, self._rows)

    def _flush(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="lt_det_masks_")
        for part in self._parts:
            self._file.write(part)
            self._flushed += len(part)
        self._parts, self._bytes = [], 0

    def finish(self) -> RleTable:
        """All masks; sizes are not kept."""
        length = np.concatenate(self._length) if self._length else np.zeros(0, np.int64)
        end = np.cumsum(length)
        if self._file is not None:
            self._flush()
            self._file.flush()
            text = np.asarray(np.memmap(self._file, np.uint8, "r+", shape=(self._flushed,)))
        else:
            text = np.concatenate(self._parts) if self._parts else np.zeros(0, np.uint8)
        self._parts, self._length = [], []
        return RleTable(text, end - length, end, np.zeros((len(end), 2), np.int64))
