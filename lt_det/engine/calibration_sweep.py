"""All strengths of a calibrator from one run of the model over the validation set.

For each image the trunk, the proposals and the box head run once. Then, for each value, scores are calibrated and
non-maximum suppression gives that value's detections, exactly as the model would. The mask head, which does not depend
on scores, runs once on the union of them. What goes to disk are the detections of all values: which RoI and class, and
the score; boxes once, and masks once and only of categories that are annotated in the image, since the metrics look at
no others. That is some 100 kB an image with 300 detections and 10 values, where all scores of 1000 RoIs over 1203
classes would be 4.8 MB, and nothing is rounded: at 0 the results are those of a plain evaluation.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from lt_det.evaluation import LongTailLVISEvaluator, postprocess_without_pasting
from lt_det.io import write_atomically, write_json_atomically
from lt_det.modeling import Calibrator, box_predictors, build_calibrator
from lt_det.modeling.roi_predictions import RoIPredictions, predict_rois
from lt_det.progress import progress_bar
from lt_det.visualization import plot_calibration_sweep

from .from_yaml import images_from_config
from .logit_moments import complete_calibrators

logger = logging.getLogger(__name__)

METRICS = ("AP", "APr", "APc", "APf")
PART_BYTES = 64 * 2**20


class DetectionStore:
    """Detections of all values on disk: a description, and parts that each process writes and reads for itself.

    Attributes:
        folder: holds ``store.json`` and ``part-<rank>-<number>.npz``.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    @property
    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"part-{comm.get_rank():03d}-*.npz"))

    def write(self, images: Iterator[dict[str, np.ndarray]], description: dict) -> None:
        """Replace what is there.

        Args:
            images: for each image named arrays, the same names for all.
            description: what a reader must find again (``check``).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if comm.is_main_process():
            (self.folder / "store.json").unlink(missing_ok=True)
            for path in self.folder.glob("part-*.npz"):
                path.unlink()
        comm.synchronize()
        pending: list[dict[str, np.ndarray]] = []
        size = number = 0
        for image in images:
            pending.append(image)
            size += sum(a.nbytes for a in image.values())
            if size >= PART_BYTES:
                self._write_part(pending, number)
                pending, size, number = [], 0, number + 1
        if pending:
            self._write_part(pending, number)
        comm.synchronize()
        if comm.is_main_process():
            # Last: a store without it is not whole.
            write_json_atomically(self.folder / "store.json", {**description, "processes": comm.get_world_size()})
        comm.synchronize()

    def _write_part(self, images: list[dict[str, np.ndarray]], number: int) -> None:
        arrays = {}
        for name in images[0]:
            values = [image[name] for image in images]
            arrays[name] = np.concatenate(values)
            arrays[f"{name}_length"] = np.array([len(v) for v in values])
        path = self.folder / f"part-{comm.get_rank():03d}-{number:05d}.npz"
        write_atomically(path, lambda file: np.savez(file, **arrays), mode="wb")

    def check(self, description: dict) -> None:
        """Raise ``ValueError`` unless a whole store of this description is there."""
        path = self.folder / "store.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no finished run of the model; run the sweep without --reuse first")
        found = json.loads(path.read_text())
        wanted = {**description, "processes": comm.get_world_size()}
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differing:
            raise ValueError(
                f"{path}: the stored run differs in "
                + ", ".join(f"{key} ({found.get(key)!r}, now {wanted[key]!r})" for key in differing)
                + "; run the sweep without --reuse"
            )

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for path in self._parts:
            with np.load(path) as part:
                names = [name for name in part.files if not name.endswith("_length")]
                arrays = {name: part[name] for name in names}
                ends = {name: np.cumsum(part[f"{name}_length"]) for name in names}
            for i in range(len(ends[names[0]])):
                yield {name: array[(ends[name][i - 1] if i else 0) : ends[name][i]] for name, array in arrays.items()}


def _image_arrays(
    detections: list[Instances], rows: list[torch.Tensor], rois: RoIPredictions, index: int, wanted: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The detections of one image under all values, as a store keeps them.

    Args:
        detections, rows: by value, of this image.
        rois: of the whole batch. index: place of the image in the batch.
        wanted: class indices whose masks are kept; None: of all.
    """
    num_classes = rois.stages[-1][0].num_classes
    # Detections of the same RoI and class have the same box and mask whatever their score.
    keys = torch.cat([row * num_classes + d.pred_classes for d, row in zip(detections, rows)])
    union, place = torch.unique(keys, return_inverse=True)
    boxes = detections[0].pred_boxes.tensor.new_zeros((len(union), 4))
    boxes[place] = torch.cat([d.pred_boxes.tensor for d in detections])
    classes = union % num_classes
    arrays = {
        "boxes": boxes.cpu().numpy(),
        "classes": classes.to(torch.int32).cpu().numpy(),
        "place": place.to(torch.int32).cpu().numpy(),
        "scores": torch.cat([d.scores for d in detections]).cpu().numpy(),
        "count": np.array([len(d) for d in detections], np.int32),
        "input_size": np.array(detections[0].image_size, np.int32),
    }
    if rois.detector.roi_heads.mask_on:
        keep = torch.ones_like(classes, dtype=torch.bool)
        if wanted is not None:
            keep = torch.isin(classes, torch.as_tensor(wanted, device=classes.device))
        instances = [Instances(p.image_size) for p in rois.stages[-1][2]]
        for i, inst in enumerate(instances):
            chosen = keep if i == index else keep[:0]
            inst.pred_boxes = Boxes((boxes if i == index else boxes[:0])[chosen])
            inst.pred_classes = (classes if i == index else classes[:0])[chosen]
        masks = rois.add_masks(instances)[index].pred_masks[:, 0]
        arrays["mask_index"] = keep.nonzero()[:, 0].to(torch.int32).cpu().numpy()
        arrays["masks"] = masks.float().cpu().numpy()
    return arrays


@torch.no_grad()
def _run_model(
    model: nn.Module, loader, calibrators: Sequence[Calibrator], evaluator: LongTailLVISEvaluator
) -> Iterator[dict[str, np.ndarray]]:
    predictors = box_predictors(model)
    before = [p.calibrator for p in predictors]
    was_training = model.training
    model.eval()
    try:
        for batch in progress_bar(loader, desc="model", show=comm.is_main_process()):
            rois = predict_rois(model, batch)
            found = []
            for calibrator in calibrators:
                for predictor in predictors:
                    predictor.set_calibrator(calibrator)
                found.append(rois.detections())
            for i, one_input in enumerate(batch):
                detections, rows = [f[0][i] for f in found], [f[1][i] for f in found]
                wanted = evaluator.classes_with_masks(one_input["image_id"])
                height, width = detections[0].image_size
                yield {
                    "image_id": np.array([one_input["image_id"]], np.int64),
                    "output_size": np.array([one_input.get("height", height), one_input.get("width", width)], np.int32),
                    **_image_arrays(detections, rows, rois, i, wanted),
                }
    finally:
        for predictor, calibrator in zip(predictors, before):
            predictor.set_calibrator(calibrator)
        model.train(was_training)


def _instances(image: dict[str, np.ndarray], value_index: int) -> Instances:
    """The detections of one value in the coordinates of the original image."""
    ends = np.cumsum(image["count"])
    part = slice(ends[value_index] - image["count"][value_index], ends[value_index])
    place = torch.from_numpy(image["place"][part].astype(np.int64))
    out = Instances(tuple(image["input_size"].tolist()))
    out.pred_boxes = Boxes(torch.from_numpy(image["boxes"])[place])
    out.scores = torch.from_numpy(image["scores"][part])
    out.pred_classes = torch.from_numpy(image["classes"].astype(np.int64))[place]
    if "masks" in image:
        stored = torch.from_numpy(image["masks"])
        masks = stored.new_zeros((len(image["classes"]), *stored.shape[1:]))  # of others nothing is read
        masks[torch.from_numpy(image["mask_index"].astype(np.int64))] = stored
        out.pred_masks = masks[place][:, None]
    return postprocess_without_pasting(out, *image["output_size"].tolist())


def _evaluate(store: DetectionStore, evaluator: LongTailLVISEvaluator, values: Sequence[float]) -> list[dict]:
    """Rows ``{"value", "bbox": metrics, "segm": metrics}`` on the main process, [] on others."""
    rows = []
    for i, value in enumerate(progress_bar(values, desc="evaluation", show=comm.is_main_process())):
        evaluator.reset()
        for image in store:
            evaluator.process([{"image_id": int(image["image_id"][0])}], [{"instances": _instances(image, i)}])
        results = evaluator.evaluate()
        if comm.is_main_process():
            rows.append({"value": value, **{task: dict(metrics) for task, metrics in results.items()}})
    return rows


def calibration_sweep(
    cfg: CfgNode,
    model: nn.Module | None,
    name: str,
    values: Sequence[float],
    output_dir: str | os.PathLike,
    *,
    loader=None,
    reuse: bool = False,
) -> list[dict]:
    """Evaluate a model under every value of a calibrator, running it once.

    Writes ``sweep.json``, ``sweep.png`` and the folder ``detections`` to ``output_dir``.

    Args:
        cfg: the config, whose ``MODEL.LONG_TAIL.CALIBRATOR`` gives the calibrator's other options, and whose
            ``DATASETS.TEST`` names one data set.
        model: a detector with long-tail box predictors and its weights; not needed with ``reuse``.
        name: of the calibrator, in ``CALIBRATOR_REGISTRY``.
        values: of its strength (``Calibrator.parameter``: tau, gamma, ...), not negative; repetitions are dropped.
        output_dir: where the results go.
        loader: default ``build_detection_test_loader`` of the config.
        reuse: evaluate the detections that an earlier sweep of these values left in ``output_dir``.

    Returns:
        For each value, ascending, ``{"value": float, "bbox": metrics in percent, "segm": ...}``; [] but on rank 0.

    Raises:
        ValueError: for values, a calibrator or data sets that do not fit.
    """
    values = sorted({float(v) for v in values})
    if not values:
        raise ValueError("no values to evaluate")
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"DATASETS.TEST must name one data set to calibrate on, not {tuple(cfg.DATASETS.TEST)}")
    dataset = cfg.DATASETS.TEST[0]
    calibrators = [build_calibrator(cfg, name=name, value=value) for value in values]
    output_dir = Path(output_dir)
    store = DetectionStore(output_dir / "detections")
    description = {"calibrator": name, "values": values, "dataset": dataset, "weights": cfg.MODEL.WEIGHTS}
    evaluator = LongTailLVISEvaluator(dataset, max_dets=cfg.TEST.MAX_DETS or None)
    if reuse:
        store.check(description)
    else:
        complete_calibrators(partial(images_from_config, cfg), model, calibrators, cfg.MODEL.WEIGHTS)
        loader = build_detection_test_loader(cfg, dataset) if loader is None else loader
        store.write(_run_model(model, loader, calibrators, evaluator), description)
    rows = _evaluate(store, evaluator, values)
    if comm.is_main_process():
        parameter = calibrators[0].parameter
        write_json_atomically(
            output_dir / "sweep.json",
            {
                "calibrator": name,
                "parameter": parameter,
                "dataset": dataset,
                "weights": cfg.MODEL.WEIGHTS,
                "rows": rows,
            },
        )
        plot_calibration_sweep(rows, output_dir / "sweep.png", title=f"{name} on {dataset}", parameter=parameter)
    return rows


def format_sweep(rows: list[dict], parameter: str) -> str:
    """The table of a sweep; an asterisk marks the value of the highest AP of each task."""
    tasks = [key for key in rows[0] if key != "value"]
    best = {task: max(rows, key=lambda row: np.nan_to_num(row[task]["AP"], nan=-1))["value"] for task in tasks}
    table = []
    for row in rows:
        cells = OrderedDict({parameter: f"{row['value']:g}"})
        for task in tasks:
            for metric in METRICS:
                value = row[task].get(metric, math.nan)
                star = "*" if metric == "AP" and best[task] == row["value"] else ""
                cells[f"{'mask' if task == 'segm' else task} {metric}"] = (
                    "-" if math.isnan(value) else f"{value:.2f}{star}"
                )
        table.append(cells)
    return tabulate(table, headers="keys", tablefmt="github", stralign="right", disable_numparse=True)
