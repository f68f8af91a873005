#!/usr/bin/env python
"""How time and memory grow with the number of categories: 80 (COCO's), 1,203 (LVIS v1's) and 13,204 (V3Det's), with
counts that are all alike and counts by Zipf's law.

One image's work for what runs in every iteration: losses and classifiers on 512 RoIs (forward and backward), inference
on 1,000 boxes, the mask head on 10 detections, the meta step on 1,024 RoIs, GML's queues of 16,384 keys. The same
20,000 images with 250,000 objects for what looks at a whole data set, and 200 images with 100 detections each for the
evaluator. CPU seconds, median; peak memory that a part adds (torch's allocations, or Python's and numpy's).

    python tools/benchmarks/bench_growth.py --quick --json growth.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_losses import make_step
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances
from measuring import peak_bytes
from tabulate import tabulate

from lt_det.data import (
    ClassStatistics,
    DatasetRecords,
    class_balanced_repeat_factors,
    expected_counts,
    fractal_dimensions,
    images_that_fill,
    instance_aware_repeat_factors,
    load_lvis_or_coco_json,
    repeat_factors_from_category_frequency,
)
from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.gml.mixture import log_mixture_likelihood
from lt_det.io import write_json_atomically
from lt_det.losses import LOSS_REGISTRY
from lt_det.losses.queues import ClassQueues, queue_sizes
from lt_det.meta.gradient import LookAhead, classifier_form, row_terms, weight_gradients
from lt_det.modeling import LongTailMaskHead, LongTailOutputLayers, build_classifier

CATEGORIES = (80, 1203, 13_204)
ROIS, WIDTH, BOXES, DETECTIONS, KEYS, KEY_WIDTH = 512, 1024, 1000, 10, 16_384, 128
IMAGES, OBJECTS = 20_000, 250_000
CPU = torch.device("cpu")


class Part(NamedTuple):
    name: str
    step: Callable[[], object]
    in_torch: bool = True


def class_counts(num_classes: int, law: str, total: int = OBJECTS) -> np.ndarray:
    """``(K,)`` counts of about ``total`` objects: "uniform", or "zipf", the i-th in proportion to 1 / i."""
    share = np.ones(num_classes) if law == "uniform" else 1.0 / np.arange(1, num_classes + 1)
    return np.maximum(1, (total * share / share.sum()).round().astype(np.int64))


def make_statistics(counts: np.ndarray) -> ClassStatistics:
    names = [str(i) for i in range(len(counts))]
    return ClassStatistics(np.minimum(counts, IMAGES), counts, IMAGES, names)


# ------------------------------------------------------------------------------------------------- every iteration


def of_losses(counts: np.ndarray) -> Iterator[Part]:
    for name, _ in LOSS_REGISTRY:
        step, _, _, logits = make_step(name, ROIS, len(counts), CPU, make_statistics(counts))

        def backward(step=step, logits=logits):
            step(logits.detach().requires_grad_()).backward()

        yield Part(f"loss {name}", backward)


def of_model(counts: np.ndarray) -> Iterator[Part]:
    k = len(counts)
    features = torch.randn(ROIS, WIDTH)
    for name in ("linear", "cosine"):
        classifier = build_classifier(name, WIDTH, k + 1)
        yield Part(f"classifier, {name}", lambda c=classifier: c(features).sum().backward())

    corner = torch.rand(BOXES, 2) * torch.tensor([1000.0, 600.0])
    proposals = Instances((800, 1333))
    proposals.proposal_boxes = Boxes(torch.cat([corner, corner + 20 + 200 * torch.rand(BOXES, 2)], 1))
    layers = LongTailOutputLayers(
        ShapeSpec(channels=WIDTH), box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), num_classes=k,
        test_score_thresh=1e-4, test_topk_per_image=300, cls_agnostic_bbox_reg=True,
        loss=LOSS_REGISTRY.get("Softmax")(k),
    )  # fmt: skip
    predictions = (2 * torch.randn(BOXES, k + 1), torch.zeros(BOXES, 4))
    yield Part("inference: softmax and suppression", no_grad(lambda: layers.inference(predictions, [proposals])))

    found = Instances((800, 1333))
    found.pred_boxes = proposals.proposal_boxes[:DETECTIONS]
    found.pred_classes = torch.arange(DETECTIONS) % k
    of_rois = torch.randn(DETECTIONS, 256, 14, 14)
    for name, cls in (("Detectron2's", MaskRCNNConvUpsampleHead), ("lt_det's", LongTailMaskHead)):
        head = cls(ShapeSpec(channels=256, width=14, height=14), num_classes=k, conv_dims=[256] * 5).eval()
        yield Part(f"mask head, {name}", no_grad(lambda head=head: head(of_rois, [found])))


def of_methods(counts: np.ndarray) -> Iterator[Part]:
    k = len(counts)
    classifier = build_classifier("linear", WIDTH, k + 1)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.02, momentum=0.9)
    form = classifier_form(classifier)
    features, labels = torch.randn(2 * ROIS, WIDTH), torch.randint(k + 1, (2 * ROIS,))

    def meta_step():
        with torch.no_grad():
            scores = classifier(features)
        terms = row_terms(
            lambda z, w: (w * torch.nn.functional.cross_entropy(z, labels, reduction="none")).sum(), scores
        )
        ahead = LookAhead(optimizer, form.parameters)
        loss = torch.nn.functional.cross_entropy
        return weight_gradients(
            form, ahead, features, terms, torch.ones(2 * ROIS), features, lambda z: loss(z, labels)
        )  # fmt: skip

    yield Part("meta step", meta_step)

    base = max(1, min(10, KEYS // (2 * k)))
    queues = ClassQueues(queue_sizes(counts, KEYS, base), KEY_WIDTH)
    unit = torch.nn.functional.normalize
    of_class = torch.multinomial(torch.as_tensor(counts, dtype=torch.float64), KEYS, replacement=True)
    queues.insert(unit(torch.randn(KEYS, KEY_WIDTH)), of_class, torch.arange(KEYS))
    rows, ids = unit(torch.randn(ROIS, KEY_WIDTH)), torch.arange(ROIS)
    yield Part("GML: queues take 512", lambda: queues.insert(rows, of_class[:ROIS], ids))
    queries = rows[:128].clone().requires_grad_()

    def mixture():
        keys, offsets, _ = queues.contents()
        value = log_mixture_likelihood(queries, keys, offsets, 0.1)
        value[value.isfinite()].sum().backward()

    yield Part("GML: mixture of 128 queries", mixture)


def no_grad(function: Callable) -> Callable:
    def call():
        with torch.no_grad():
            return function()

    return call


# ------------------------------------------------------------------------------------------------ a whole data set


def of_data(counts: np.ndarray, folder: Path) -> Iterator[Part]:
    k = len(counts)
    rng = np.random.default_rng(0)
    category = rng.permutation(np.repeat(np.arange(k), counts)).tolist()
    image = np.sort(rng.integers(0, IMAGES, len(category))).tolist()
    centers = rng.random((len(category), 2))
    annotations = [
        {"id": i, "image_id": image[i], "category_id": category[i], "bbox": [x, y, 1.0, 1.0]}
        for i, (x, y) in enumerate((600 * centers).tolist())
    ]
    images = [{"id": i, "width": 640, "height": 640, "file_name": f"{i}.jpg"} for i in range(IMAGES)]
    listed = [{"id": c, "name": str(c)} for c in range(k)]
    path = folder / "data.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": listed}))
    records = DatasetRecords([load_lvis_or_coco_json(path, folder, check_images=False)])
    for name, function in (
        ("class statistics", lambda: ClassStatistics.from_dataset_dicts(records, k)),
        ("sampler: repeat factors", lambda: repeat_factors_from_category_frequency(records, 0.001)),
        ("sampler: instance-aware", lambda: instance_aware_repeat_factors(records, 0.001)),
        ("sampler: class-balanced", lambda: class_balanced_repeat_factors(records)),
        ("prior sampled", lambda: expected_counts(records, k, np.ones(IMAGES))),
        ("images that fill GML's queues", lambda: images_that_fill(records, np.full(k, 2))),
        ("fractal dimensions", lambda: fractal_dimensions(centers, np.array(category), k)),
    ):
        yield Part(name, function, in_torch=False)


def of_evaluation(counts: np.ndarray, folder: Path) -> Iterator[Part]:
    k, images = len(counts), 200
    rng = np.random.default_rng(0)
    share = counts / counts.sum()
    truth, detections = [], []
    for i in range(images):
        for c in rng.choice(k, 10, p=share).tolist():
            x, y, w, h = (rng.random(4) * 200 + 10).round(1).tolist()
            truth.append(
                {"id": len(truth) + 1, "image_id": i + 1, "category_id": c + 1, "bbox": [x, y, w, h], "area": w * h}
            )
            found = {"image_id": i + 1, "category_id": c + 1, "bbox": [x + 3, y, w, h], "score": rng.random()}
            detections.append(found)
        for c in rng.choice(k, 90, p=share).tolist():
            box = (rng.random(4) * 200 + 10).round(1).tolist()
            detections.append({"image_id": i + 1, "category_id": c + 1, "bbox": box, "score": rng.random()})
    listed = [{"id": c + 1, "name": str(c), "frequency": "rcf"[c % 3], "image_count": 1} for c in range(k)]
    shots = [
        {"id": i + 1, "width": 640, "height": 480, "coco_url": f"http://x/val/{i}.jpg", "neg_category_ids": [],
         "not_exhaustive_category_ids": []} for i in range(images)
    ]  # fmt: skip
    gt, results = folder / "gt.json", folder / "results.json"
    gt.write_text(json.dumps({"images": shots, "annotations": truth, "categories": listed}))
    results.write_text(json.dumps(detections))

    def evaluate():
        evaluate_results(GroundTruth.from_json(str(gt), with_masks=False), str(results), iou_types=("bbox",))

    yield Part("evaluator", evaluate, in_torch=False)


# --------------------------------------------------------------------------------------------------------- measuring


def megabytes(part: Part) -> float:
    if part.in_torch:
        return peak_bytes(part.step, CPU) / 1e6
    tracemalloc.start()
    try:
        part.step()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def milliseconds(part: Part, repeats: int) -> float:
    part.step()  # warms up
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        part.step()
        taken.append(time.process_time() - start)
    return 1e3 * statistics.median(taken)


def parts_of(counts: np.ndarray, folder: Path) -> Iterator[Part]:
    for of in (of_losses, of_model, of_methods):
        yield from of(counts)
    yield from of_data(counts, folder)
    yield from of_evaluation(counts, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="80 and 1,203 categories by Zipf's law, 1 repeat")
    parser.add_argument("--repeats", type=int, help="timed repeats (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = [(k, law) for k in CATEGORIES for law in ("uniform", "zipf")]
    if args.quick:
        settings = [(k, "zipf") for k in CATEGORIES[:2]]
    repeats = args.repeats or (1 if args.quick else 3)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for k, law in settings:
            for part in parts_of(class_counts(k, law), Path(folder)):
                cell = {"milliseconds": milliseconds(part, repeats), "megabytes": megabytes(part)}
                rows.setdefault(part.name, {})[f"{k} {law}"] = cell
            print(f"measured {k} categories, {law} counts", flush=True)
            if args.json:  # what there is so far
                cells = [{"part": name, "cells": of} for name, of in rows.items()]
                write_json_atomically(args.json, {"rows": cells}, indent=1)
    names = [f"{k} {law}" for k, law in settings]
    table = [
        [name] + [f"{c[n]['milliseconds']:.4g} / {c[n]['megabytes']:.3g}" for n in names] for name, c in rows.items()
    ]
    print(tabulate(table, headers=["ms / MB", *names], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
