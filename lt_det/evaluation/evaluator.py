"""The evaluator for Detectron2's evaluation loop."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BitMasks, BoxMode, ROIMasks
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .ground_truth import GroundTruth
from .in_loop import ImagePredictions, ImageResult, ImageWork, ScoreLog
from .matching import IOU_TYPES, Matches
from .metrics import add_cell_caps, summarize
from .report import format_metrics, save_report
from .submission import SubmissionShard, merge_shards

__all__ = ["LongTailLVISEvaluator"]

logger = logging.getLogger(__name__)

_DETECTIONS_PER_CATEGORY = 10000  # AP-fixed


class LongTailLVISEvaluator(DatasetEvaluator):
    """AP of boxes and masks by category frequency, exact to the LVIS API (COCO style: to pycocotools).

    Every rank matches its own images while the model runs and keeps about 18 bytes a detection; ranks exchange match
    flags only. The mask of a detection is encoded where its category is annotated in the image, the rest only when a
    submission is written.

    Outputs of any Detectron2 model are accepted: full-image masks as every stock model gives them, or
    :class:`detectron2.structures.ROIMasks`, which :class:`lt_det.evaluation.DeferredMaskPasting` lets a model give;
    they are pasted and encoded without a full-image bitmap.

    Encoding and matching go on beside the model in a thread, mostly without the GIL.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        output_dir: str | None = None,
        max_dets: int | None = None,
        distributed: bool = True,
        ap_fixed: bool = False,
        boundary: bool = False,
        write_submission: bool = False,
        num_workers: int = 1,
        federated: bool | None = None,
        frequency_groups: Mapping[str, Sequence[int]] | None = None,
        segm_area: str = "mask",
        mask_threshold: float = 0.5,
        boundary_dilation_ratio: float = 0.02,
        plots: bool = False,
    ):
        """
        Args:
            dataset_name: registered data set whose metadata have ``json_file``. LVIS rules apply when its
                ``evaluator_type`` is "lvis" or its images carry federated fields, else COCO rules.
            tasks: of "bbox", "segm", "boundary"; None: "bbox", and "segm" where predictions carry masks.
            output_dir: where metrics.json, per_category.csv and matches_<task>.npz go (and plots and the submission);
                None: nothing is written.
            max_dets: detections an image (LVIS rules, default 300) or an image and category (COCO rules, default 100)
                that count.
            distributed: gather from all ranks; otherwise each process evaluates what it saw.
            ap_fixed: add AP-fixed and AP-pool, with 10,000 detections a category and no cap by image.
            boundary: add the task "boundary" where there are masks.
            write_submission: write ``lvis_instances_results.json``; needs ``output_dir`` and costs the encoding of all
                masks. It stands on disk in shards while the model runs.
            num_workers: threads that encode and match while the model goes on; 0 works in the calling thread.
            federated: LVIS rules (True) or COCO rules (False) whatever the data set looks like.
            frequency_groups: category ids (of the json) of "r", "c", "f", in place of what the json says.
            segm_area: area that sorts a detected mask into small, medium, large: "mask", as Detectron2's evaluator
                does, or "box", as the official API does for results that carry boxes too.
            mask_threshold: probability from which a pixel of :class:`ROIMasks` belongs to the mask.
            boundary_dilation_ratio: width of the boundary region over the image diagonal.
            plots: write plots too (matplotlib).

        Raises:
            ValueError: an argument is wrong, or the data set cannot be evaluated; the message names it.
        """
        if tasks is not None and (not tasks or set(tasks) - set(IOU_TYPES)):
            raise ValueError(f"tasks is {tuple(tasks)}; choose of {IOU_TYPES}, or None for what predictions carry.")
        if write_submission and not output_dir:
            raise ValueError("write_submission needs output_dir.")
        if segm_area not in ("mask", "box"):
            raise ValueError(f"segm_area is {segm_area!r}; it must be 'mask' or 'box'.")
        if max_dets is not None and max_dets < 1:
            raise ValueError(f"max_dets is {max_dets}; it must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more.")
        self._tasks = tuple(tasks) if tasks is not None else None
        if boundary and self._tasks is not None and "boundary" not in self._tasks:
            self._tasks += ("boundary",)
        self._boundary = boundary
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._distributed = distributed
        self._ap_fixed = ap_fixed
        self._write_submission = write_submission
        self._num_workers = num_workers
        self._segm_area = segm_area
        self._mask_threshold = mask_threshold
        self._plots = plots

        metadata = MetadataCatalog.get(dataset_name)
        json_file = metadata.get("json_file")
        if not json_file:
            raise ValueError(
                f"the data set '{dataset_name}' has no json_file in its metadata, so there is no ground truth to "
                "evaluate with. Register it with register_lvis_instances or register_coco_instances."
            )
        if federated is None and metadata.get("evaluator_type") == "lvis":
            federated = True
        self._boxes_only = self._tasks is not None and set(self._tasks) == {"bbox"}
        self._gt = GroundTruth.from_json(
            PathManager.get_local_path(json_file),
            with_masks=not self._boxes_only,
            federated=federated,
            frequency_groups=frequency_groups,
        )
        self._max_dets = max_dets or (300 if self._gt.federated else 100)
        self._class_to_rank = self._class_mapping(metadata.get("thing_dataset_id_to_contiguous_id"))
        self._work = ImageWork(
            gt=self._gt,
            box_types=self._iou_types(masks=False),
            mask_types=self._iou_types(masks=True),
            max_dets=self._max_dets,
            segm_area=segm_area,
            mask_threshold=mask_threshold,
            boundary_ratio=boundary_dilation_ratio,
            write_lines=write_submission,
        )
        self._pool: ThreadPoolExecutor | None = None
        self.reset()

    @property
    def ground_truth(self) -> GroundTruth:
        """The annotations that it evaluates with."""
        return self._gt

    @property
    def output_dir(self) -> str | None:
        """The folder that it writes to; None: it writes nothing."""
        return self._output_dir

    @property
    def dataset_name(self) -> str:
        """The data set that it evaluates on."""
        return self._dataset_name

    def _class_mapping(self, dataset_id_to_contiguous: Mapping[int, int] | None) -> np.ndarray:
        """Category rank of each class index of the model."""
        gt = self._gt
        if dataset_id_to_contiguous is None:
            return np.arange(gt.num_categories)
        out = np.full(max(dataset_id_to_contiguous.values()) + 1, -1, np.int64)
        ids = np.array(list(dataset_id_to_contiguous), np.int64)
        rank = gt.category_ranks(ids)
        if (rank < 0).any():
            raise ValueError(
                f"thing_dataset_id_to_contiguous_id of '{self._dataset_name}' names category ids that its json has "
                f"not: {ids[rank < 0][:5].tolist()}."
            )
        out[list(dataset_id_to_contiguous.values())] = rank
        return out

    # ------------------------------------------------------------------ the loop

    def reset(self) -> None:
        self._close_pool()
        self._seen = np.zeros(self._gt.num_images, bool)
        self._has_masks: bool | None = None
        self._num_predictions = 0
        self._pending: deque[tuple[ImagePredictions, Future]] = deque()
        self._matches: dict[str, list[Matches]] = {}
        self._log = ScoreLog(_DETECTIONS_PER_CATEGORY) if self._ap_fixed else None
        if getattr(self, "_shard", None) is not None:
            self._shard.discard()
        self._shard: SubmissionShard | None = None

    def process(self, inputs, outputs) -> None:
        """
        Args:
            inputs: list of dicts with "image_id".
            outputs: list of dicts with "instances": Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and,
                for masks, ``pred_masks``: (N, H, W) bool of the image's size, BitMasks, or ROIMasks.
        """
        for one_input, output in zip(inputs, outputs):
            if "instances" not in output:
                raise ValueError(
                    f"the model gave {sorted(output)} for image {one_input['image_id']}; LongTailLVISEvaluator needs "
                    "'instances'. Proposals are evaluated by detectron2.evaluation.LVISEvaluator."
                )
            predictions = self._to_host(one_input["image_id"], output["instances"])
            if self._num_workers:
                self._submit(predictions)
            else:
                self._store(predictions, self._work(predictions))

    def _submit(self, predictions: ImagePredictions) -> None:
        """Hands an image to the workers, and takes what is done, in the order of the images."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="lt_det_eval")
        self._pending.append((predictions, self._pool.submit(self._work, predictions)))
        most = 4 * self._num_workers
        while len(self._pending) > most or (self._pending and self._pending[0][1].done()):
            self._store_first()

    def _store_first(self) -> None:
        predictions, future = self._pending[0]  # stays there on an error, so that it cannot go unnoticed
        try:
            result = future.result()
            self._pending.popleft()
            self._store(predictions, result)
        except BaseException:
            self._close_pool()
            raise

    def _to_host(self, image_id: int, instances) -> ImagePredictions:
        """Checks one output and brings to the host what the metrics need of it."""
        gt = self._gt
        rank = int(gt.image_ranks([image_id])[0])
        if rank < 0:
            raise ValueError(
                f"image {image_id} is not in the ground truth of '{self._dataset_name}'. Does the loader read another "
                "data set?"
            )
        if self._seen[rank]:
            raise ValueError(f"image {image_id} was processed twice; call reset() between evaluations.")
        self._seen[rank] = True
        classes = instances.pred_classes.detach().cpu().numpy().astype(np.int64, copy=False)
        if len(classes) and (classes.min() < 0 or classes.max() >= len(self._class_to_rank)):
            raise ValueError(
                f"image {image_id} has class {int(classes.max())}, and '{self._dataset_name}' has "
                f"{len(self._class_to_rank)} categories. Check MODEL.ROI_HEADS.NUM_CLASSES."
            )
        category = self._class_to_rank[classes]
        boxes = instances.pred_boxes.tensor.detach().cpu()
        # As in a results file: width and height are differences in the precision of the model's output.
        xywh = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).numpy().astype(np.float64)
        score = instances.scores.detach().cpu().numpy().astype(np.float64)
        if not (np.isfinite(score).all() and np.isfinite(xywh).all()):
            raise ValueError(f"image {image_id} has a score or a box that is not finite; the model has diverged.")
        out = ImagePredictions(image=rank, category=category, score=score, boxes=xywh.reshape(-1, 4))
        self._num_predictions += len(score)
        present = instances.has("pred_masks")
        if len(score):
            self._check_masks(present)
        if present and (self._write_submission or not self._boxes_only):
            self._masks_to_host(out, instances.pred_masks, boxes)
        return out

    def _check_masks(self, present: bool) -> None:
        if self._has_masks is None:
            self._has_masks = present
            if self._tasks is not None and not present and set(self._tasks) & {"segm", "boundary"}:
                raise ValueError(
                    f"tasks {self._tasks} need masks, and the predictions have none (no 'pred_masks'). Is "
                    "MODEL.MASK_ON False?"
                )
        elif self._has_masks != present:
            raise ValueError("some predictions have 'pred_masks' and some have none.")

    def classes_with_masks(self, image_id: int) -> np.ndarray | None:
        """Class indices of the model whose masks this evaluation looks at in an image; None: all."""
        categories = self._categories_with_masks(int(self._gt.image_ranks([image_id])[0]))
        return None if categories is None else np.flatnonzero(np.isin(self._class_to_rank, categories))

    def _categories_with_masks(self, image: int) -> np.ndarray | None:
        """Ranks of the categories whose masks count in an image, by rank; None: all."""
        gt = self._gt
        if self._write_submission or not gt.federated:
            return None
        return gt.cell_category[gt.cell_start[image] : gt.cell_start[image + 1]]

    def _masks_to_host(self, out: ImagePredictions, masks, boxes: torch.Tensor) -> None:
        gt = self._gt
        wanted = self._categories_with_masks(out.image)
        index = np.arange(len(out.score)) if wanted is None else np.flatnonzero(np.isin(out.category, wanted))
        out.mask_index = index
        height, width = gt.image_sizes[out.image].tolist()
        if isinstance(masks, ROIMasks):
            tensor = masks.tensor[torch.as_tensor(index, device=masks.tensor.device)]
            out.roi_masks = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            out.roi_boxes = np.ascontiguousarray(boxes[torch.as_tensor(index)].float().numpy())
            return
        tensor = masks.tensor if isinstance(masks, BitMasks) else masks
        if tensor.dim() != 3 or (len(tensor) and tuple(tensor.shape[1:]) != (height, width)):
            raise ValueError(
                f"masks of image {gt.image_ids[out.image]} have shape {tuple(tensor.shape)}, and the ground truth "
                f"says (N, {height}, {width}). Masks must be of the original image's size, or ROIMasks."
            )
        if tensor.dtype.is_floating_point:
            tensor = tensor > self._mask_threshold
        tensor = tensor[torch.as_tensor(index, device=tensor.device)]
        out.bitmaps = np.ascontiguousarray(tensor.detach().cpu().numpy()).view(np.uint8)

    def _iou_types(self, masks: bool) -> Sequence[str]:
        if self._tasks is not None:
            return self._tasks if masks else tuple(t for t in self._tasks if t == "bbox")
        return ("bbox",) + (("segm",) + (("boundary",) if self._boundary else ()) if masks else ())

    def _store(self, predictions: ImagePredictions, result: ImageResult) -> None:
        for task, part in result.matches.items():
            parts = self._matches.setdefault(task, [])
            parts.append(part)
            if len(parts) >= 4096:  # many small arrays cost more than what they hold
                self._matches[task] = [Matches.concatenate(parts)]
        if self._log is not None and result.empty is not None:
            image = np.full(len(predictions.score), predictions.image)
            self._log.add(image, predictions.category, predictions.score, result.empty)
        if result.lines is not None:
            if self._shard is None:
                self._shard = SubmissionShard(self._output_dir, comm.get_rank())
            self._shard.write(result.lines)

    def _finish_work(self) -> None:
        while self._pending:
            self._store_first()
        self._close_pool()

    def _close_pool(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    # ------------------------------------------------------------------ the result

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """
        Returns:
            On rank 0, metrics in percent by task, NaN where a group has no category to average over; {} on the other
            ranks, and when the ground truth has no annotations (test sets).
        """
        self._finish_work()
        local = {
            "matches": {task: Matches.concatenate(parts) for task, parts in self._matches.items()},
            "log": self._log.best() if self._log is not None else None,
            "seen": np.flatnonzero(self._seen),
            "num_predictions": self._num_predictions,
            "has_masks": self._has_masks,
            "shard": self._shard.close() if self._shard is not None else None,
        }
        self._matches, self._shard = {}, None
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(local, dst=0)
            if not comm.is_main_process():
                return OrderedDict()
        else:
            gathered = [local]
        return self._evaluate_gathered(gathered)

    def _evaluate_gathered(self, gathered: list[dict]) -> OrderedDict[str, dict[str, float]]:
        gt = self._gt
        seen = np.concatenate([g["seen"] for g in gathered])
        if len(np.unique(seen)) != len(seen):
            raise ValueError("several ranks processed the same image; use Detectron2's InferenceSampler.")
        if len(seen) < gt.num_images:
            logger.warning(
                "Predictions cover %d of the %d images of '%s'; annotations in the others count as missed, as in the "
                "official API.",
                len(seen),
                gt.num_images,
                self._dataset_name,
            )
        if self._write_submission:
            path = os.path.join(self._output_dir, "lvis_instances_results.json")
            merge_shards([g["shard"] for g in gathered if g["shard"] is not None], path)
            logger.info("Wrote %d detections to %s", sum(g["num_predictions"] for g in gathered), path)
        if not gt.num_annotations:
            logger.info("'%s' has no annotations: nothing to evaluate.", self._dataset_name)
            return OrderedDict()
        if not sum(g["num_predictions"] for g in gathered):
            logger.warning(
                "The model found nothing in the %d images of '%s': every annotation counts as missed. If it has "
                "trained at all, lower MODEL.ROI_HEADS.SCORE_THRESH_TEST (test_score_thresh).",
                len(seen),
                self._dataset_name,
            )
        has_masks = any(g["has_masks"] for g in gathered)
        tasks = self._tasks or self._iou_types(has_masks)
        caps = ("image",) if gt.federated else ()
        logs = None
        if self._ap_fixed:
            log = ScoreLog(_DETECTIONS_PER_CATEGORY)
            for g in gathered:
                log.add(*g["log"])
            logs = log.best()
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        details = {}
        for task in tasks:
            parts = [g["matches"].pop(task) for g in gathered if task in g["matches"]]
            matches = Matches.concatenate(parts) if parts else Matches.empty(caps)
            if not parts and not gt.federated:
                add_cell_caps(matches, self._max_dets)
            if logs is not None:
                ScoreLog.add_cap(logs, matches, gt.num_categories, masks=task != "bbox" and self._segm_area == "mask")
            results[task], details[task] = summarize(gt, matches, self._max_dets)
            details[task]["matches"] = matches
        logger.info("Evaluation of %s:\n%s", self._dataset_name, format_metrics(results), extra={"whole": True})
        if self._output_dir:
            save_report(self._output_dir, gt, results, details, plots=self._plots)
        return results
