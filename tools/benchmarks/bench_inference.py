#!/usr/bin/env python
"""Inference at LVIS's size beside Detectron2's: suppression, mask predictor, and a whole image by part.

Both take turns; times are CPU seconds, medians over repeats, and ratios are medians over pairs of neighbours in time.
Weights are random, scores spread so that about 5e5 of 1,000 x 1,203 candidates pass 1e-4.

* suppression: ``fast_rcnn_inference`` of random boxes and scores at several thresholds, and of proposals that all cover
  one object.
* mask predictor: all channels and the choice of one, beside one channel.
* image: Mask R-CNN R50-FPN with the same random weights, from the image to the run lengths of its masks. Detectron2's
  way pastes every mask into the image and encodes it with pycocotools; ours is the evaluator's. Each has a process of
  its own: lt_det's commands keep freed memory (``--plain-memory``: here not).

``identical``: boxes, scores, classes and their order, bit for bit. Masks differ by the rounding of another product.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference as detectron2_inference
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Instances
from measuring import median_ratio
from tabulate import tabulate
from torch import Tensor, nn

from lt_det.config import get_lt_det_cfg
from lt_det.evaluation.in_loop import ImagePredictions
from lt_det.io import write_json_atomically
from lt_det.modeling import LongTailMaskHead, fast_rcnn_inference
from lt_det.processes import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent.parent
SPREAD = 2.2  # standard deviation of the logits: 5e5 of 1.2e6 softmax probabilities above 1e-4
PARTS = ("backbone and FPN", "proposals", "box head", "scores to detections", "mask head", "run lengths of masks")


def in_turns(theirs: Callable, ours: Callable, repeats: int) -> tuple[list[float], list[float], tuple]:
    """CPU seconds of both, taking turns, and what each returned last."""
    seconds: tuple[list[float], list[float]] = ([], [])
    results = [None, None]
    for _ in range(repeats):
        for i, function in enumerate((theirs, ours)):
            start = time.process_time()
            results[i] = function()
            seconds[i].append(time.process_time() - start)
    return *seconds, tuple(results)


def equal(theirs: tuple[list[Instances], list[Tensor]], ours: tuple[list[Instances], list[Tensor]]) -> bool:
    """Bit for bit: boxes, scores, classes, their order, and the rows that they come from."""
    return all(
        torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        and torch.equal(a.scores, b.scores)
        and torch.equal(a.pred_classes, b.pred_classes)
        and torch.equal(i, j)
        for a, b, i, j in zip(*theirs[:1], *ours[:1], *theirs[1:], *ours[1:], strict=True)
    )


def random_boxes(count: int, height: int, width: int, *, one_object: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([width, height], dtype=torch.float32)
    corner, extent = torch.rand(2, count, 2, generator=generator)
    if one_object:  # shifted by up to 3 % of its size
        corner, extent = (0.3 + 0.01 * corner) * size, (0.4 + 0.01 * extent) * size
    else:
        corner, extent = corner * size * 0.8, 16 + extent * size * 0.2
    return torch.cat([corner, corner + extent], dim=1)


def suppression(rows: int, classes: int, topk: int, repeats: int) -> list[dict]:
    """Rows of the table of suppression."""
    height, width = 800, 1333
    generator = torch.Generator().manual_seed(0)
    scores = (SPREAD * torch.randn(rows, classes + 1, generator=generator)).softmax(dim=1)
    wanted = max(1, rows * classes // 138)  # 8.7e3 of 1,000 x 1,203
    high = scores[:, :-1].flatten().topk(wanted).values[-1].item()
    cases = [
        ("few candidates", high, False),
        ("threshold 1e-4", 1e-4, False),
        ("threshold 0", 0.0, False),
        ("one object, threshold 1e-4", 1e-4, True),
    ]
    table = []
    for name, threshold, one_object in cases:
        boxes = random_boxes(rows, height, width, one_object=one_object)

        def run(function, boxes=boxes, threshold=threshold):
            # Detectron2 clips its input in place.
            return function([boxes.clone()], [scores], [(height, width)], threshold, 0.5, topk)

        theirs, ours, results = in_turns(lambda: run(detectron2_inference), lambda: run(fast_rcnn_inference), repeats)
        table.append({
            "case": name,
            "candidates": int((scores[:, :-1] > threshold).sum()),
            "detectron2_seconds": statistics.median(theirs),
            "seconds": statistics.median(ours),
            "speedup": median_ratio(theirs, ours),
            "identical": equal(*results),
        })  # fmt: skip
    return table


def mask_predictor(detections: int, classes: int, repeats: int) -> dict:
    """From the predictor's input to the probabilities of the predicted classes."""
    torch.manual_seed(0)
    head = LongTailMaskHead(ShapeSpec(channels=256, height=14, width=14), num_classes=classes, conv_dims=[256]).eval()
    nn.init.normal_(head.predictor.weight, std=0.03)
    features = torch.rand(detections, 256, 28, 28)
    image = Instances((800, 1333), pred_classes=torch.randint(classes, (detections,)))

    def probabilities(logits: Tensor) -> Tensor:
        mask_rcnn_inference(logits, [image])
        return image.pred_masks

    theirs, ours, (a, b) = in_turns(
        lambda: probabilities(head.predictor(features)),
        lambda: probabilities(head.logits_of(features, image.pred_classes)),
        repeats,
    )
    return {
        "detectron2_seconds": statistics.median(theirs),
        "seconds": statistics.median(ours),
        "speedup": median_ratio(theirs, ours),
        "largest_difference": (a - b).abs().max().item(),
        "megabytes_not_allocated": (classes - 1) * detections * 28 * 28 * 4 / 1e6,
    }


def detector_config(classes: int, detections: int, agnostic: bool) -> CfgNode:
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(ROOT / "configs/Base-LVIS.yaml"))
    cfg.merge_from_list([
        "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", classes,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1e-4, "TEST.DETECTIONS_PER_IMAGE", detections,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic,
    ])  # fmt: skip
    return cfg


def detector(ours: bool, setting: argparse.Namespace) -> nn.Module:
    """Ours, or Detectron2's with the same random weights."""
    cfg = detector_config(setting.classes, setting.detections, setting.agnostic)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.2)  # frozen statistics do not tame random weights
    nn.init.normal_(model.roi_heads.mask_head.predictor.weight, std=0.03)
    if ours:
        return model
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock = build_model(cfg).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    return stock


class ImageByParts:
    """One image through a detector, a part at a time.

    Args:
        encode: from the detections and the image's size to the run lengths of their masks.
    """

    def __init__(self, detector: nn.Module, image: Tensor, encode: Callable[[Instances, int, int], object]):
        self.detector, self.image, self.encode = detector, image, encode

    def steps(self) -> Sequence[Callable[[], object]]:
        return (self.trunk, self.proposals, self.box_head, self.detections, self.masks, self.lengths)

    def trunk(self):
        self.images = self.detector.preprocess_image([{"image": self.image}])
        self.maps = self.detector.backbone(self.images.tensor)

    def proposals(self):
        self.proposed, _ = self.detector.proposal_generator(self.images, self.maps, None)

    def box_head(self):
        heads = self.detector.roi_heads
        boxes = [p.proposal_boxes for p in self.proposed]
        pooled = heads.box_pooler([self.maps[f] for f in heads.box_in_features], boxes)
        self.features = heads.box_head(pooled)
        self.predictions = heads.box_predictor(self.features)

    def detections(self):
        self.found = self.detector.roi_heads.box_predictor.inference(self.predictions, self.proposed)
        self.found = ([Instances(i.image_size, **i.get_fields()) for i in self.found[0]], self.found[1])

    def masks(self):
        self.result = self.detector.roi_heads.forward_with_given_boxes(self.maps, self.found[0])[0]

    def lengths(self):
        self.encoded = self.encode(self.result, *self.image.shape[1:])


def encode_detectron2(result: Instances, height: int, width: int) -> object:
    return instances_to_coco_json(detector_postprocess(result, height, width), 0)


def encode_ours(result: Instances, height: int, width: int) -> object:
    boxes, masks = result.pred_boxes.tensor.numpy(), result.pred_masks[:, 0].numpy()
    empty = np.zeros(0)
    return ImagePredictions(0, empty, empty, empty, roi_masks=masks, roi_boxes=boxes).encode(height, width)


@torch.no_grad()
def serve(connection: Connection, ours: bool, setting: argparse.Namespace) -> None:
    """A process with one of the detectors: a part's number comes, its CPU seconds go; None asks for the results."""
    torch.set_num_threads(setting.threads)
    if ours and not setting.plain_memory:
        keep_freed_memory()
    model = detector(ours, setting)
    image = torch.rand(3, *setting.size, generator=torch.Generator().manual_seed(2)) * 255
    run = ImageByParts(model, image, encode_ours if ours else encode_detectron2)
    steps = run.steps()
    for step in steps[:3] if not ours else steps:  # compiles what is compiled at first use
        step()
    # Scores as spread as a trained model's are.
    model.roi_heads.box_predictor.cls_score.weight.mul_(SPREAD / run.predictions[0].std())
    connection.send(None)
    while (number := connection.recv()) is not None:
        start = time.process_time()
        steps[number]()
        connection.send(time.process_time() - start)
    (found,), (rows,) = run.found
    found = [found.pred_boxes.tensor, found.scores, found.pred_classes, rows, run.result.pred_masks]
    candidates = int((run.predictions[0].softmax(dim=1)[:, :-1] > 1e-4).sum())
    connection.send(([t.numpy() for t in found], candidates))


def start(ours: bool, setting: argparse.Namespace) -> Connection:
    here, there = multiprocessing.Pipe()
    # Forked before torch has threads, which a fork does not take over.
    multiprocessing.get_context("fork").Process(target=serve, args=(there, ours, setting), daemon=True).start()
    there.close()  # so that the end of the process ends the wait for it
    return here


def whole_image(sides: Sequence[Connection], repeats: int) -> dict:
    """Args: sides: of the processes of Detectron2's detector and of ours."""
    for side in sides:
        side.recv()
    seconds: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part in PARTS}
    for _ in range(repeats):
        for number, part in enumerate(PARTS):
            for side, times in zip(sides, seconds[part]):
                side.send(number)
                times.append(side.recv())
    for side in sides:
        side.send(None)
    (theirs_found, _), (found, candidates) = (side.recv() for side in sides)
    theirs, own = ([sum(s[i][r] for s in seconds.values()) for r in range(repeats)] for i in (0, 1))
    return {
        "parts": {part: [statistics.median(s) for s in pair] for part, pair in seconds.items()},
        "total": [statistics.median(theirs), statistics.median(own)],
        "ratio": median_ratio(own, theirs),
        "detections": len(found[0]),
        "boxes": len(np.unique(found[0], axis=0)),
        "candidates": candidates,
        "identical": all(np.array_equal(a, b) for a, b in zip(theirs_found[:-1], found[:-1])),
        "largest_difference": float(np.abs(theirs_found[-1] - found[-1]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller image, one repeat: under a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="default 800 1333; 320 533 with --quick")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--proposals", type=int, default=1000, help="of the table of suppression")
    parser.add_argument("--detections", type=int, default=300)
    parser.add_argument("--agnostic", action="store_true", help="an image's boxes are refined for all classes alike")
    parser.add_argument("--repeats", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="of torch; CPU seconds are least disturbed with one")
    parser.add_argument("--plain-memory", action="store_true", help="lt_det's process gives freed memory back too")
    args = parser.parse_args()
    repeats = args.repeats or (1 if args.quick else 3)
    height, width = args.size = args.size or ((320, 533) if args.quick else (800, 1333))
    sides = [start(ours, args) for ours in (False, True)]
    torch.set_num_threads(args.threads)

    with torch.no_grad():
        nms = suppression(args.proposals, args.classes, args.detections, repeats)
        mask = mask_predictor(args.detections, args.classes, repeats)
    rows = [
        [r["case"], r["candidates"], 1e3 * r["detectron2_seconds"], 1e3 * r["seconds"], r["speedup"], r["identical"]]
        for r in nms
    ]
    head = ["suppression", "candidates", "Detectron2, ms", "lt_det, ms", "times faster", "identical"]
    print(tabulate(rows, headers=head, floatfmt=".1f", tablefmt="github"), end="\n\n")
    print(
        f"mask predictor, {args.detections} detections: {1e3 * mask['detectron2_seconds']:.0f} ms, one channel "
        f"{1e3 * mask['seconds']:.0f} ms; largest difference of a probability {mask['largest_difference']:.1e}\n",
        flush=True,
    )
    image = whole_image(sides, repeats)
    rows = [[part, *pair] for part, pair in image["parts"].items()] + [["whole image", *image["total"]]]
    head = [f"image of {height} x {width}", "Detectron2, CPU s", "lt_det, CPU s"]
    print(tabulate(rows, headers=head, floatfmt=".2f", tablefmt="github"))
    print(f"{image['detections']} detections of {image['boxes']} boxes")
    print(f"largest difference of a mask's probability: {image['largest_difference']:.1e}\n")
    by_case = {r["case"]: r for r in nms}
    result = {
        "nms_speedup": by_case["threshold 1e-4"]["speedup"],
        "nms_speedup_one_object": by_case["one object, threshold 1e-4"]["speedup"],
        "mask_head_speedup": mask["speedup"],
        "image_time_ratio": image["ratio"],
        "identical": all(r["identical"] for r in nms) and image["identical"],
        "suppression": nms,
        "mask_predictor": mask,
        "image": image,
        "setting": f"{height} x {width}, {args.classes} classes, {args.threads} threads, torch {torch.__version__}, "
        f"{platform.machine()}",
    }
    for key in ("nms_speedup", "nms_speedup_one_object", "mask_head_speedup", "image_time_ratio", "identical"):
        print(f"{key}: {result[key]:.2f}" if key != "identical" else f"{key}: {result[key]}")
    if args.json:
        write_json_atomically(args.json, result)


if __name__ == "__main__":
    main()
