"""Results of a model, checked as they come in parts, and what of them the metrics need."""

from __future__ import annotations

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_det.progress import progress_bar

from .ground_truth import GroundTruth, rank_table
from .matching import IOU_TYPES, Matches, match_detections, of_cells, ranges
from .metrics import add_cell_caps
from .results_io import BOX, CATEGORY, IMAGE, MASK, SCORE, ResultPart
from .rle import RleTable, by_problem, encode_segmentations

__all__ = ["CollectedResults", "InvalidResultsError", "ResultCollector", "among_the_best"]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 15  # detections matched at a time, in whole images
_MASKS_IN_MEMORY = 1 << 29  # bytes of mask strings; more go to a temporary file
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
class CollectedResults:
    """The results that count, n of them, in the order of the file.

    Attributes:
        image, category, cell (n,) int32: ranks, and the ground-truth cell, -1 where there is none.
        score (n,) float64.
        caps: by name, (n,) bool: whether the cap keeps a result, see :meth:`ResultCollector.collected`.
        areas: of "bbox" and "segm", (n,) float64: what sorts detections into small, medium, large.
        boxes: (n, 4) float64 x, y, width, height; None where nothing needs them.
    """

    image: np.ndarray
    category: np.ndarray
    cell: np.ndarray
    score: np.ndarray
    caps: dict[str, np.ndarray]
    areas: dict[str, np.ndarray | None]
    boxes: np.ndarray | None
    _mask_row: np.ndarray | None
    _masks: RleTable

    def masks(self, index: np.ndarray) -> RleTable:
        """The masks of the results at ``index``. In the place of one that was not kept, in a cell without annotations,
        stands another: nothing looks at it."""
        return self._masks.take(np.maximum(self._mask_row[index], 0)) if len(self._masks) else self._masks


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
            gt, iou_types, segm_area: as of :func:`lt_det.evaluation.evaluate_results`.
            source: what messages call the results.
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

        The ranks are -1 where it cannot, so that rows of the file and of the log stay the same. A bad one is counted
        once, under its first problem.
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
        problems = dict.fromkeys(np.flatnonzero(broken).tolist(), "run lengths do not cover the image") | problems
        for kind, bad in by_problem({kept[k]: problem for k, problem in problems.items()}, len(part)):
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
                "\nCategory ids look zero-based: the file has 0, and the annotations count from 1. Map class indices "
                "to category ids before writing."
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

    def collected(self, max_dets: int, per_category: int | None = None) -> CollectedResults:
        """All that was added, at least one result; it is freed here.

        Caps: "image", ``max_dets`` an image (LVIS rules), and "category", ``per_category`` over the data set, where it
        is given. Both count results that say nothing, too.
        """
        gt = self.gt
        image, category, score = (np.concatenate(c) for c in zip(*self._log))
        self._log = []
        kept = {name: np.concatenate([k[name] for k in self._kept]) for name in self._kept[0]}
        self._kept = []
        row = kept["row"]
        caps = {}
        if gt.federated:
            caps["image"] = among_the_best(max_dets, image, gt.num_images, score)[row]
        if per_category:
            caps["category"] = among_the_best(per_category, category, gt.num_categories, score)[row]
        boxes, mask_area = kept.get("boxes"), kept.get("mask_area")
        box_area = boxes[:, 2] * boxes[:, 3] if boxes is not None else None
        areas = {
            "bbox": box_area if self._carries & BOX else mask_area,
            "segm": box_area if self._segm_area == "box" else mask_area,
        }
        return CollectedResults(
            image[row], category[row], kept["cell"], score[row], caps, areas, boxes, kept.get("mask"),
            self._spool.finish(),
        )  # fmt: skip

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
        gt = self.gt
        cap_names = (("image",) if gt.federated else ()) + (("category",) if per_category else ())
        self.iou_types = self.iou_types or ("bbox",)
        out = {task: Matches.empty(cap_names) for task in self.iou_types}
        if self.num_results:
            from . import _match_kernels as kernels

            found = self.collected(max_dets, per_category)
            order, start = kernels.group_order(found.image.astype(np.int64), gt.num_images)
            for task in out:
                parts = self._match_parts(found, task, order, _blocks(start), boundary_ratio, num_threads, progress)
                out[task] = Matches.concatenate(parts) if parts else out[task]
        if not gt.federated:
            for matches in out.values():
                add_cell_caps(matches, max_dets)
        return out

    def _match_parts(
        self,
        found: CollectedResults,
        task: str,
        order: np.ndarray,
        blocks: list[tuple],
        boundary_ratio: float,
        num_threads: int,
        progress: bool,
    ) -> list[Matches]:
        """Matches of each of ``blocks``, ranges of ``order``, which is the results image by image."""

        def work(block: tuple[int, int]) -> Matches:
            index = order[block[0] : block[1]]
            return match_detections(
                self.gt,
                task,
                image=found.image[index],
                category=found.category[index],
                score=found.score[index],
                area=found.areas["bbox" if task == "bbox" else "segm"][index],
                caps={name: flags[index] for name, flags in found.caps.items()},
                cell=found.cell[index],
                boundary_ratio=boundary_ratio,
                boxes=found.boxes[index] if task == "bbox" else None,
                masks=None if task == "bbox" else found.masks(index),
            )

        parts = []
        bar = progress_bar(total=len(order), unit="det", unit_scale=True, desc=f"matching {task}", show=progress)
        with ThreadPoolExecutor(num_threads) as pool, bar:
            for block, matches in zip(blocks, pool.map(work, blocks)):
                parts.append(matches)
                bar.update(block[1] - block[0])
        return parts


def among_the_best(limit: int, group: np.ndarray, num_groups: int, score: np.ndarray) -> np.ndarray:
    """(n,) bool, whether each row is among the ``limit`` best of its group; earlier rows win ties. Group -1: none."""
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
    return inside


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
        """Adds masks, and gives their row numbers."""
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
