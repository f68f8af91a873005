#!/usr/bin/env python
"""A training iteration with GML beside one with softmax, and the mixture likelihood beside a loop over classes.

Mask R-CNN R50-FPN with 1203 classes and random weights, on small random images: forward, backward, optimizer step. All
engines take turns in every repeat; ratios are of neighbours in time, times medians. The queues are full.

* softmax: the detector with Detectron2's loss.
* GML: cosine classifier, query and key projection, queues; a frozen teacher of the same size looks at the same images.
* GML without the teacher: the same, with the teacher's features of these images computed beforehand.
* GML, wide projections: hidden layers as wide as the features (MODEL.LONG_TAIL.GML.HIDDEN_DIM 0).

The mixture likelihood log S(q|c), forward and backward, is timed on RoIs as they come from these images; the loop
takes the classes one by one.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
import time

import torch
from bench_meta import LR, MOMENTUM, WEIGHT_DECAY, make_batch, make_detector, make_statistics
from detectron2.utils.events import EventStorage
from measuring import median_ratio as ratio
from measuring import synchronize
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from lt_det.gml import MutualInformation, MutualInformationDetector, Teacher, log_mixture_likelihood
from lt_det.io import write_json_atomically
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import box_predictors
from lt_det.progress import progress_bar


class Engine:
    """Forward, backward and step of a module that gives losses."""

    def __init__(self, module: nn.Module, batch: list[dict]):
        self.module, self.batch = module.train(), batch
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=LR * 1e-3, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def step(self) -> None:
        losses = sum(self.module(self.batch).values())
        self.optimizer.zero_grad()
        losses.backward()
        self.optimizer.step()


class Remembered(nn.Module):
    """Gives what a teacher gave for these images."""

    def __init__(self, teacher: Teacher, batch: list[dict]):
        super().__init__()
        boxes = [x["instances"].gt_boxes.to(teacher.detector.device) for x in batch]
        self._features = teacher(batch, boxes)

    def forward(self, batched_inputs, boxes, *, with_logits=False):
        return self._features


def with_loss(detector: nn.Module, name: str, num_classes: int, **options) -> nn.Module:
    """A copy of the detector with another loss and a new classifier."""
    detector = copy.deepcopy(detector)
    loss = LOSS_REGISTRY.get(name)(num_classes, statistics=make_statistics(num_classes), **options)
    box_predictors(detector)[0].set_loss(loss, reinit=True)
    return detector


def make_gml(detector: nn.Module, teacher: nn.Module, width: int) -> MutualInformationDetector:
    predictor = box_predictors(detector)[0]
    branch = MutualInformation(predictor.loss, predictor.cls_score.in_features, width)
    queues = branch.queues
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(queues.keys.shape, generator=generator)
    # Ids that no box of the batch has.
    queues.insert(features, queues.class_of_slot, torch.arange(len(features)) + 2**40)
    return MutualInformationDetector(detector, teacher, [branch]).to(detector.device)


def loop_over_classes(queries, keys, offsets, temperature):
    """The equation, class by class."""
    columns = []
    for c in range(len(offsets) - 1):
        similarity = queries @ keys[offsets[c] : offsets[c + 1]].T / temperature[c]
        columns.append(similarity.logsumexp(dim=1) - math.log(similarity.shape[1]))
    return torch.stack(columns, dim=1)


def time_mixture(
    module: MutualInformationDetector, rows: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    branch = module.branches[0]
    generator = torch.Generator().manual_seed(1)
    keys, offsets, _ = branch.queues.contents()
    width = branch.key_projection.out.out_features
    queries, keys = (
        F.normalize(torch.randn(n, width, generator=generator), dim=1).to(device) for n in (rows, len(keys))
    )
    temperature = torch.full((len(offsets) - 1,), 0.07, device=device)
    borders = offsets.tolist()
    seconds: dict[str, list[float]] = {"one product, one reduction": [], "loop over classes": []}
    for repeat in range(repeats + 1):
        for name, function in zip(seconds, (log_mixture_likelihood, loop_over_classes)):
            leaves = [x.clone().requires_grad_() for x in (queries, keys, temperature)]
            synchronize(device)
            start = time.perf_counter()
            value = function(leaves[0], leaves[1], offsets if name[0] == "o" else borders, leaves[2])
            value.logsumexp(dim=1).sum().backward()
            synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, no wide projections: under a minute on two cores"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument(
        "--images", type=int, default=2, help="images in a batch; two are what a GPU has in LVIS's recipes"
    )
    parser.add_argument("--rois", type=int, default=512, help="sampled from an image; 512 in LVIS's recipes")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--repeats", type=int, help="default 5; 2 with --quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    images, repeats = args.images, args.repeats or (2 if args.quick else 5)
    device = torch.device(args.device)

    batch = make_batch(args.size, images, args.classes, seed=1)
    base = make_detector(args.classes, args.rois, device)
    teacher = Teacher(copy.deepcopy(base))
    width = teacher.widths[0]
    remembered = Remembered(teacher, batch)
    engines = {"softmax": Engine(with_loss(base, "Softmax", args.classes), batch)}
    for name, its_teacher, options in (
        ("GML", teacher, {}),
        ("GML without the teacher", remembered, {}),
        ("GML, wide projections", teacher, {"hidden_dim": 0}),
    ):
        if args.quick and options:
            continue
        module = make_gml(with_loss(base, "GML", args.classes, **options), its_teacher, width)
        engines[name] = Engine(module, batch)
    del base

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with EventStorage(), progress_bar(total=(repeats + 1) * len(engines), unit="step") as progress:
        for repeat in range(repeats + 1):
            for name, engine in engines.items():
                torch.manual_seed(repeat)
                synchronize(device)
                start = time.perf_counter()
                engine.step()
                synchronize(device)
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
                progress.update()
    gml = engines["GML"].module
    mixture = time_mixture(gml, 64 * images, repeats, device)

    rows = [[name, statistics.median(s), ratio(s, seconds["softmax"])] for name, s in seconds.items()]
    print(tabulate(rows, headers=["iteration", "seconds", "of softmax"], floatfmt=".3f", tablefmt="github"), end="\n\n")
    one, loop = mixture.values()
    rows = [[name, 1e3 * statistics.median(s), ratio(s, one)] for name, s in mixture.items()]
    print(tabulate(rows, headers=["log S(q|c)", "ms", "ratio"], floatfmt=".2f", tablefmt="github"), end="\n\n")
    result = {
        "ratio_to_softmax_with_teacher": ratio(seconds["GML"], seconds["softmax"]),
        "ratio_to_softmax_without_teacher": ratio(seconds["GML without the teacher"], seconds["softmax"]),
        "queue_megabytes": gml.branches[0].queues.megabytes,
        "mixture_speedup_vs_loop": ratio(loop, one),
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "setting": f"{images} images of {args.size} x {args.size}, {args.rois} RoIs each, {args.classes} classes, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}",
    }
    for key in (
        "ratio_to_softmax_with_teacher",
        "ratio_to_softmax_without_teacher",
        "queue_megabytes",
        "mixture_speedup_vs_loop",
    ):
        print(f"{key}: {result[key]:.2f}")
    if args.json:
        write_json_atomically(args.json, result)


if __name__ == "__main__":
    main()
