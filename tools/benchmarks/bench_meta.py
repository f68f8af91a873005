#!/usr/bin/env python
"""An iteration of stage 2 with the meta step: plain, ours, the textbook way, and from cached features; time
and peak memory.

Mask R-CNN R50-FPN with 1203 classes and random weights, on small random images. All engines take turns in
every repeat; times are medians. A meta engine sees two batches in an iteration (training and meta), the plain
ones one.

* plain: Detectron2's decoupled step. All but ``cls_score`` is frozen, but the whole detector runs forward,
  with mask head and all losses.
* classifier only: lt_det's decoupled step without meta (``DecoupledClassifier``).
* meta (ours): ``MetaDecoupledClassifier`` with ``MetaReweighter``: trunk once a batch, closed-form gradient.
* meta (textbook): what BALMS's published code does with a library for differentiable optimizers. The whole
  detector as a function of its parameters, an inner step with graph, its loss on the meta batch, double
  backward; then the training step: three passes.
* classifier only / meta (cached): the same as above, with RoI features read from a feature cache on disk.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from measuring import median_ratio, peak_bytes, synchronize
from tabulate import tabulate
from torch import nn
from torch.func import functional_call

from lt_det.data import ClassStatistics
from lt_det.engine import get_lt_det_cfg
from lt_det.engine.feature_cache import FeatureCache, ShardWriter
from lt_det.io import write_json_atomically
from lt_det.losses import LOSS_REGISTRY
from lt_det.meta import MetaDecoupledClassifier, MetaReweighter, MetaStep
from lt_det.modeling import DecoupledClassifier, box_predictors
from lt_det.modeling.decoupled import freeze_trunk
from lt_det.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent.parent
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4


def make_statistics(num_classes: int) -> ClassStatistics:
    """Counts that fall off as LVIS v1's do."""
    counts = np.logspace(0, 4.2, num_classes).round().astype(int)
    names = [f"class {i}" for i in range(num_classes)]
    return ClassStatistics(image_count=counts, instance_count=counts * 3, num_images=100_170, names=names)


def make_detector(num_classes: int, rois: int, device: torch.device) -> nn.Module:
    """Mask R-CNN R50-FPN of the LVIS configs, with weights that keep activations in range.

    Args:
        rois: RoIs sampled from an image.
    """
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(ROOT / "configs/Base-LVIS.yaml"))
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", str(device), "MODEL.ROI_HEADS.NUM_CLASSES", num_classes])
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = rois
    torch.manual_seed(0)
    detector = build_model(cfg)
    for module in detector.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.2)  # frozen statistics do not tame random weights
    balanced = LOSS_REGISTRY.get("BalancedSoftmax")(num_classes, statistics=make_statistics(num_classes))
    box_predictors(detector)[0].set_loss(balanced)
    return detector.train()


def make_batch(size: int, count: int, num_classes: int, seed: int) -> list[dict]:
    random = np.random.default_rng(seed)
    batch = []
    for _ in range(count):
        corner = random.uniform(0, size * 0.6, (8, 2))
        boxes = np.concatenate([corner, corner + random.uniform(size * 0.1, size * 0.35, (8, 2))], axis=1)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.as_tensor(random.integers(0, num_classes, 8))
        polygons = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes]
        instances.gt_masks = PolygonMasks(polygons)
        image = torch.as_tensor(random.integers(0, 256, (3, size, size)), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


def make_optimizer(detector: nn.Module) -> torch.optim.SGD:
    parameters = [p for p in detector.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


# ------------------------------------------------------------------------------------------ engines


class Plain:
    """Stock Detectron2 with a frozen trunk, or lt_det's module of stage 2."""

    def __init__(self, module: nn.Module, detector: nn.Module, batch: list[dict], optimizer=None):
        self.module, self.batch = module, batch
        self.optimizer = make_optimizer(detector) if optimizer is None else optimizer

    def step(self) -> None:
        losses = sum(self.module(self.batch).values())
        self.optimizer.zero_grad()
        losses.backward()
        self.optimizer.step()


class Ours(Plain):
    def __init__(self, detector: nn.Module, batch: list[dict], meta_batch: Callable[[], list[dict]], num_classes: int):
        freeze_trunk(detector)
        optimizer = make_optimizer(detector)
        meta = MetaStep(
            MetaReweighter(num_classes),
            LOSS_REGISTRY.get("Softmax")(num_classes),
            optimizer=optimizer,
            open_batches=lambda start: iter(meta_batch, None),
        )
        super().__init__(MetaDecoupledClassifier(detector, meta), detector, batch, optimizer)


class WeightedLoss(nn.Module):
    """A loss whose rows have learned weights, with the plain loss beside it: what BALMS's predictor computes in every
    pass."""

    def __init__(self, loss: nn.Module, learner: MetaReweighter):
        super().__init__()
        self.loss, self.plain = loss, LOSS_REGISTRY.get("Softmax")(loss.num_classes)
        self._learner = [learner]  # its parameters are not the detector's
        self.wants_features = False

    def forward(self, scores, labels, *, roi_weights=None):
        learner = self._learner[0]
        counts = torch.bincount(labels, minlength=learner.num_classes + 1)[:-1]
        weights = learner.class_weights(counts, generator=torch.Generator())
        weights = torch.cat([weights, weights.new_ones(1)])[labels]
        return {
            "loss_cls": self.loss(scores, labels, roi_weights=weights),
            "loss_plain": self.plain(scores, labels),
        }


class Textbook(Plain):
    """Equations (1) and (2) of ``lt_det.meta.gradient`` with graph, through the whole detector, and autograd for the
    rest."""

    def __init__(self, detector: nn.Module, batch: list[dict], meta_batch: list[dict], num_classes: int):
        super().__init__(detector, detector, batch)
        self.detector, self.meta_batch = detector, meta_batch
        self.learner = MetaReweighter(num_classes).to(detector.device)
        self.adam = torch.optim.Adam(self.learner.parameters(), lr=0.01)
        self.predictor = box_predictors(detector)[0]
        self.weighted = WeightedLoss(self.predictor.loss, self.learner)

    def step(self) -> None:
        usual, self.predictor.loss = self.predictor.loss, self.weighted
        try:
            self.meta_step()
            losses = self.detector(self.batch)
            losses.pop("loss_plain")
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
            self.optimizer.step()
        finally:
            self.predictor.loss = usual

    def meta_step(self) -> None:
        parameters = dict(self.detector.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        inner = functional_call(self.detector, parameters, (self.batch,))["loss_cls"]
        gradients = torch.autograd.grad(inner, list(trained.values()), create_graph=True)
        ahead = dict(parameters)
        for (name, p), g in zip(trained.items(), gradients):
            g = g + WEIGHT_DECAY * p
            buffer = self.optimizer.state[p].get("momentum_buffer")
            ahead[name] = p - LR * (g if buffer is None else MOMENTUM * buffer + g)
        meta_loss = functional_call(self.detector, ahead, (self.meta_batch,))["loss_plain"]
        self.adam.zero_grad()
        # The library differentiates with respect to the copied parameters too.
        meta_loss.backward()
        self.adam.step()


def write_cache(folder: Path, detector: nn.Module, batches: list[list[dict]]) -> list[list[dict]]:
    """A feature cache of these images; returns the batches' records."""
    writer = ShardWriter(folder, 0, 0, box_predictors(detector)[0].cls_score.in_features)
    records, written = [], 0
    for batch in batches:
        (rois,) = DecoupledClassifier(detector).roi_batches(batch)
        writer.append(rois.features, rois.gt_classes, rois.per_image)
        records.append([{"cache_index": written + i} for i in range(len(batch))])
        written += len(batch)
    writer.close()
    return records


class _Cached:
    """A batch that is read from the cache again for every iteration, as a loader does."""

    def __init__(self, cache: FeatureCache, records: list[dict]):
        self._cache, self._records = cache, records

    def read(self) -> list[dict]:
        return [self._cache(record) for record in self._records]


# ------------------------------------------------------------------------------------------ measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="smaller images, fewer repeats: under a minute on two cores"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default 256; 128 with --quick)")
    parser.add_argument("--images", type=int, help="images in a batch (default 2; 1 with --quick)")
    parser.add_argument("--rois", type=int, default=512, help="sampled from an image; 512 in LVIS's recipes")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--repeats", type=int, help="default 7; 3 with --quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    size, repeats = args.size or (128 if args.quick else 256), args.repeats or (3 if args.quick else 7)
    images = args.images or (1 if args.quick else 2)
    device = torch.device(args.device)

    detector = make_detector(args.classes, args.rois, device)
    batch, meta_batch = (make_batch(size, images, args.classes, seed) for seed in (1, 2))
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        engines: dict[str, Plain] = {
            "classifier only": Plain(DecoupledClassifier(detector), detector, batch)
        }  # freezes it
        engines = {
            "plain": Plain(detector, detector, batch),
            **engines,
            "meta (ours)": Ours(detector, batch, lambda: meta_batch, args.classes),
            "meta (textbook)": Textbook(detector, batch, meta_batch, args.classes),
        }
        records = write_cache(Path(folder), detector, [batch, meta_batch])
        cache = FeatureCache(Path(folder), num_shards=1, num_classifiers=1)
        cached, cached_meta = (_Cached(cache, r) for r in records)
        plain_cached = Plain(DecoupledClassifier(detector), detector, cached.read())
        ours_cached = Ours(detector, cached.read(), cached_meta.read, args.classes)
        engines.update({"classifier only (cached)": plain_cached, "meta (cached)": ours_cached})

        def step(name: str) -> None:
            engine = engines[name]
            if name.endswith("(cached)"):
                engine.batch = cached.read()
            engine.step()

        seconds: dict[str, list[float]] = {name: [] for name in engines}
        with progress_bar(total=(repeats + 1) * len(engines), unit="step") as progress:
            for repeat in range(repeats + 1):
                for name in engines:
                    torch.manual_seed(repeat)
                    synchronize(device)
                    start = time.perf_counter()
                    step(name)
                    synchronize(device)
                    if repeat:  # the first warms up
                        seconds[name].append(time.perf_counter() - start)
                    progress.update()
        # The profiler is slow, and what the cached engines need is small.
        profiled = [name for name in engines if not (args.quick and name.endswith("(cached)"))]
        memory = {name: peak_bytes(lambda name=name: step(name), device) / 2**20 for name in profiled}

    def ratio(a: str, b: str) -> float:
        return median_ratio(seconds[a], seconds[b])

    rows = [[name, statistics.median(s), ratio(name, "plain"), memory.get(name)] for name, s in seconds.items()]
    print(
        tabulate(
            rows,
            headers=["iteration", "seconds", "of plain", "peak MB"],
            floatfmt=("", ".4f", ".3f", ".0f"),
            missingval="-",
            tablefmt="github",
        )
    )
    result = {
        "ratio_to_plain_step": ratio("meta (ours)", "plain"),
        "speedup_vs_textbook": ratio("meta (textbook)", "meta (ours)"),
        "memory_ratio_vs_textbook": memory["meta (ours)"] / memory["meta (textbook)"],
        "cached_step_speedup": ratio("meta (ours)", "meta (cached)"),
        "cached_plain_step_speedup": ratio("classifier only", "classifier only (cached)"),
        "classifier_only_ratio_to_plain_step": ratio("classifier only", "plain"),
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "peak_megabytes": memory,
        "setting": f"{images} images of {size} x {size}, {args.rois} RoIs each, {args.classes} classes, {device}, "
        f"{torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {platform.machine()}",
    }
    for key in (
        "ratio_to_plain_step",
        "speedup_vs_textbook",
        "memory_ratio_vs_textbook",
        "cached_step_speedup",
    ):
        print(f"{key}: {result[key]:.2f}")
    if args.json:
        write_json_atomically(args.json, result)


if __name__ == "__main__":
    main()
