"""Ground truth and predictions of an image, side by side."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lt_det.evaluation import GroundTruth
from lt_det.evaluation.errors import NamedDetections
from lt_det.visualization.names import short_names
from lt_det.visualization.objects import DrawnObject, draw_objects, jpeg

__all__ = ["ERROR_NAMES", "draw_pair"]

_RIGHT, _WRONG, _IGNORED = "#2fb457", "#e5383b", "#9aa5b1"
ERROR_NAMES = {"localisation": "location", "classification": "class"}  # shorter ones
_MOST_LABELS = 40  # of a picture; the objects beyond are drawn without


def draw_pair(gt: GroundTruth, image: int, file: str, found: NamedDetections, *, side: int = 560) -> bytes:
    """A JPEG: the ground truth on the left (red: no detection is right about it), the detections on the right (red:
    wrong; grey: the annotation says nothing about them).

    Args:
        image: rank of the image. file: its picture.
        found: detections of some images, this one among them.
        side: longest side of each half in pixels.
    """
    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    height, width = pixels.shape[:2]
    names = short_names(gt.category_names)
    start = np.searchsorted(gt.annotation_image, [image, image + 1])
    truth = []
    for k in range(*start.tolist()):
        if not gt.ignore[k]:
            name = names[gt.annotation_category[k]]
            mask = _decode(gt.masks, k, height, width)
            truth.append(DrawnObject(gt.boxes[k], name, _RIGHT if found.found[k] else _WRONG, mask))
    predicted = []
    for d in np.flatnonzero(found.image == image).tolist():
        kind = found.kind[d]
        colour = {"right": _RIGHT, "ignored": _IGNORED}.get(kind, _WRONG)
        label = f"{names[found.category[d]]} {found.score[d]:.2f}"
        if colour == _WRONG:
            label += f" {ERROR_NAMES.get(kind, kind)}"
        mask = _decode(found.masks, d, height, width)
        box = found.boxes[d] if mask is None else _box(mask)
        predicted.append(DrawnObject(box, label, colour, mask))
    halves = []
    for objects in (truth, predicted):
        for one in objects[_MOST_LABELS:]:
            one.label = ""
        # A page shows the pair at a little over half its size.
        halves.append(draw_objects(pixels, objects, longest_side=side, text_size=17))
    gap = 6
    sheet = Image.new("RGB", (2 * halves[0].width + gap, halves[0].height), "#ffffff")
    sheet.paste(halves[0], (0, 0))
    sheet.paste(halves[1], (halves[0].width + gap, 0))
    return jpeg(sheet, quality=78)


def _decode(masks, k: int, height: int, width: int) -> np.ndarray | None:
    if masks is None:
        return None
    import pycocotools.mask as mask_utils

    return mask_utils.decode({"size": [height, width], "counts": masks.take([k]).strings()[0]}).astype(bool)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
