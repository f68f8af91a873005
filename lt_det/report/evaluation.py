"""What the page of an evaluated model shows, as numbers: of one run, from its folder or from a results file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from lt_det.data.image_files import image_path
from lt_det.evaluation import GroundTruth, evaluate_results, read_results, summarize
from lt_det.evaluation.calibration import Calibration, best_thresholds, calibrate
from lt_det.evaluation.compare import load_run_matches
from lt_det.evaluation.errors import ErrorAnalysis, analyse_errors
from lt_det.evaluation.matching import IOU_THRESHOLDS, Matches, main_cap
from lt_det.evaluation.metrics import Accumulated
from lt_det.evaluation.results_io import BOX, MASK
from lt_det.io.json_blocks import iter_json_blocks

__all__ = ["ImageSummary", "Run", "classifier_norms", "detections_of", "image_files", "image_summary", "read_run"]

RESULTS_FILE = "lvis_instances_results.json"


@dataclass
class Run:
    """An evaluated model.

    Attributes:
        name: for headings. source: the folder or file that was named.
        metrics: percent, by IoU type. curves, matches: what they come from, by IoU type.
        results: the results file, or None where there is none any more.
        main: the IoU type that charts are about.
        errors: None without a results file.
        calibration: by frequency group, of all detections; calibration_high: of those from a score of 0.1 on.
        thresholds: rows of :func:`lt_det.evaluation.calibration.best_thresholds`.
        norms: (K,) length of each class's classifier weight, or None.
    """

    name: str
    source: str
    metrics: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Accumulated]
    matches: Mapping[str, Matches]
    results: str | None
    main: str = "bbox"
    errors: ErrorAnalysis | None = None
    calibration: dict[str, Calibration] = field(default_factory=dict)
    calibration_high: dict[str, Calibration] = field(default_factory=dict)
    thresholds: list[dict[str, Any]] = field(default_factory=list)
    norms: np.ndarray | None = None

    @property
    def threshold(self) -> np.ndarray:
        """(K,) score threshold of each category."""
        return np.array([row["threshold"] for row in self.thresholds])

    def analyse(self, gt: GroundTruth, main: str, *, progress: bool = False) -> None:
        """Compute what is not there yet, for the IoU type ``main``."""
        self.main = main
        matches = self.matches[main]
        self.calibration = calibrate(gt, matches)
        self.calibration_high = calibrate(gt, matches, min_score=0.1)
        self.thresholds = best_thresholds(gt, matches)
        if self.results:
            self.errors = analyse_errors(gt, self.results, iou_type=main, skip_invalid=True, progress=progress)


def read_run(gt: GroundTruth, path: str, *, name: str = "", progress: bool = False) -> Run:
    """Read an evaluated model.

    Args:
        gt: the ground truth, with masks where the run has any.
        path: the folder that an evaluation wrote (``matches_<type>.npz``; the errors of its detections are shown
            where ``lvis_instances_results.json`` is there too), a run's OUTPUT_DIR with it as ``inference``, or a
            results file of any model, which is evaluated.

    Raises:
        FileNotFoundError, ValueError: it is neither; the message says what is missing.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}; name the folder of an evaluation, or a results file.")
    parts = os.path.abspath(path).split(os.sep)
    # output/run/inference and output/run/results.json are called after the run.
    name = name or (parts[-2] if parts[-1] in ("inference", RESULTS_FILE) else parts[-1])
    if not os.path.isdir(path):
        done = evaluate_results(gt, path, progress=progress)
        curves = {task: parts["main"] for task, parts in done.curves.items()}
        return Run(name, path, done.metrics, curves, done.matches, path)
    path, matches = load_run_matches(path, gt)
    metrics, curves = {}, {}
    for task, found in matches.items():
        # Only the label of AR depends on it where the cap is by image.
        most = 300 if gt.federated else max(int(cap.removeprefix("cell")) for cap in found.prefix if "cell" in cap)
        metrics[task], of_caps = summarize(gt, found, most)
        curves[task] = of_caps["main"]
    results = os.path.join(path, RESULTS_FILE)
    return Run(name, path, metrics, curves, matches, results if os.path.isfile(results) else None)


def classifier_norms(state: Mapping[str, Any], gt: GroundTruth, names: Sequence[str] | None = None) -> np.ndarray:
    """(K,) Euclidean length of each category's row of the classifier's weight, in a model's state dict.

    Args:
        state: tensors or arrays by name; a cascade's last classifier is taken.
        names: the classes that the model learned, in their order; by default those of ``gt``, by ascending id.

    Raises:
        ValueError: there is no classifier, or it has other classes.
    """
    found = sorted(key for key in state if "box_predictor" in key and key.endswith("cls_score.weight"))
    if not found:
        raise ValueError("the checkpoint has no box_predictor...cls_score.weight, so no classifier to look at.")
    weight = np.asarray(state[found[-1]], np.float64)
    K = gt.num_categories
    names = list(names or gt.category_names)
    if len(weight) < K or len(names) != K or set(names) != set(gt.category_names):
        raise ValueError(
            f"the checkpoint's classifier has {len(weight)} rows for {len(names)} classes, the annotations have {K} "
            "categories, or they have other names."
        )
    norm = np.linalg.norm(weight, axis=1)
    if names == list(gt.category_names):
        return norm[:K]
    row = {name: i for i, name in enumerate(names)}
    return norm[[row[name] for name in gt.category_names]]


# ---------------------------------------------------------------------------------------------- images


@dataclass
class ImageSummary:
    """At each category's best threshold and IoU 0.5, by image: right and wrong detections, objects, and F1 (NaN in an
    image with none of them)."""

    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray
    f1: np.ndarray

    def worst(self, number: int) -> list[int]:
        """Images of lowest F1, those of most errors first."""
        known = np.flatnonzero(self.objects > 0)
        errors = self.wrong + self.objects - self.right
        return known[np.lexsort((-errors[known], self.f1[known]))][:number].tolist()

    def best(self, number: int) -> list[int]:
        """Images of highest F1, those of most objects first."""
        known = np.flatnonzero((self.objects > 0) & (self.right > 0))
        return known[np.lexsort((-self.right[known], -self.f1[known]))][:number].tolist()


def image_summary(gt: GroundTruth, run: Run) -> ImageSummary:
    """Count what is right and wrong in each image."""
    matches = run.matches[run.main]
    cut = matches.cut(main_cap(matches))
    at = int(np.flatnonzero(np.isclose(IOU_THRESHOLDS, 0.5))[0])
    right, ignored = (((bits >> at) & 1).astype(bool) for bits in cut.tp_and_ignored())
    image = np.repeat(cut.image, cut.count)
    keep = (cut.scores >= run.threshold[np.repeat(cut.category, cut.count)]) & ~ignored
    count = [np.bincount(image[keep & part], minlength=gt.num_images) for part in (right, ~right)]
    objects = np.bincount(gt.annotation_image[~gt.ignore], minlength=gt.num_images)
    total = count[0] + count[1] + objects
    f1 = np.divide(2.0 * count[0], total, out=np.full(gt.num_images, np.nan), where=total > 0)
    return ImageSummary(count[0], count[1], objects, f1)


def image_files(annotations: str, root: str, image_ids: Sequence[int]) -> dict[int, str]:
    """The files of some images below ``root``, found as a training finds them. What is not there is left out."""
    wanted, out = set(image_ids), {}
    skip = msgspec.json.Decoder(list[msgspec.Raw]).decode
    for member, part in iter_json_blocks(annotations, {"images": json.loads, "annotations": skip}):
        for image in part if member == "images" else ():
            if image["id"] not in wanted:
                continue
            wanted.discard(image["id"])
            path = image_path(root, image)
            if path:
                out[image["id"]] = path
        if not wanted:
            break
    return out


def detections_of(gt: GroundTruth, results: str, image_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The results of some images, as dicts."""
    out = []
    for part in read_results(results, category_ids=gt.category_ids, progress=False):
        rows = np.flatnonzero(np.isin(part.image_id, np.asarray(image_ids)))
        strings = part.masks.take(rows).strings()
        sizes = gt.image_sizes[gt.image_ranks(part.image_id[rows])]
        for k, i in enumerate(rows.tolist()):
            one = {
                "image_id": int(part.image_id[i]), "category_id": int(part.category_id[i]),
                "score": float(part.score[i]),
            }  # fmt: skip
            if part.fields[i] & BOX:
                one["bbox"] = part.boxes[i].tolist()
            if i in part.shapes:
                one["segmentation"] = part.shapes[i]
            elif part.fields[i] & MASK:
                one["segmentation"] = {"size": sizes[k].tolist(), "counts": strings[k].decode()}
            out.append(one)
    return out
