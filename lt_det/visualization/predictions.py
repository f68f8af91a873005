"""Predictions of several models beside the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import detection_utils
from detectron2.structures import Instances
from pycocotools import mask as mask_api
from torchvision.ops import nms

_TRUTH, _RIGHT, _WRONG = "#ffffff", "#30d158", "#ff453a"


def draw_predictions(
    dataset_dicts: Sequence[dict],
    predictions: Mapping[str, Sequence[Instances]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    score_threshold: float = 0.2,
) -> None:
    """Draw a sheet: a row for each image, the ground truth first, then a column for each model.

    Of predictions that overlap by more than half, whatever their classes, the best is shown: green if the object
    that it covers is of its class, red otherwise.

    Args:
        dataset_dicts: the images, in Detectron2's format, with annotations.
        predictions: for each model's name, the predicted instances of each image, with masks, on the CPU.
        class_names: K short names.
        path: of the picture.
        score_threshold: predictions below it are left out.
    """
    from matplotlib.figure import Figure

    columns = ["ground truth", *predictions]
    figure = Figure(figsize=(2.9 * len(columns), 2.95 * len(dataset_dicts) + 0.3), layout="constrained")
    grid = figure.subplots(len(dataset_dicts), len(columns), squeeze=False)
    for row, entry in enumerate(dataset_dicts):
        image = detection_utils.read_image(entry["file_name"], format="RGB")
        truth = [(a["category_id"], _mask(a["segmentation"], image.shape[:2])) for a in entry["annotations"]]
        shown = [[(class_names[c], mask, _TRUTH) for c, mask in truth]]
        for instances in predictions.values():
            found = instances[row][instances[row].scores > score_threshold]
            found = found[nms(found.pred_boxes.tensor, found.scores, 0.5)]
            shown.append([
                (f"{class_names[c]} {score:.2f}", mask, _RIGHT if c == _class_under(mask, truth) else _WRONG)
                for c, score, mask in zip(found.pred_classes.tolist(), found.scores.tolist(), found.pred_masks.numpy())
            ])  # fmt: skip
        for axes, objects, name in zip(grid[row], shown, columns):
            axes.imshow(image)
            axes.set_axis_off()
            for label, mask, colour in objects:
                if not mask.any():
                    continue
                axes.contour(mask, [0.5], colors=[colour], linewidths=1.6)
                y, x = np.nonzero(mask)
                top = max(y.min(), 0.025 * len(mask))  # a label at the top edge would be cut in half
                axes.text(x.min(), top, label, color="black", fontsize=8, va="center",
                          bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                          clip_on=True)  # fmt: skip
            if row == 0:
                axes.set_title(name)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mask(segmentation: list | dict, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = mask_api.merge(mask_api.frPyObjects(segmentation, *shape))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_api.frPyObjects(segmentation, *shape)
    return mask_api.decode(segmentation).astype(bool)


def _class_under(mask: np.ndarray, truth: list[tuple[int, np.ndarray]]) -> int | None:
    """Class of the object that a mask covers with an IoU of at least 0.5."""
    best, found = 0.5, None
    for category, other in truth:
        union = (mask | other).sum()
        iou = (mask & other).sum() / union if union else 0.0
        if iou >= best:
            best, found = iou, category
    return found
