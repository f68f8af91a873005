#!/usr/bin/env python
"""An iteration of training on a CPU with lt_det's RoIAlign and with Detectron2's, and the two alone.

Mask R-CNN R50-FPN of the LVIS configs with random weights, on small random images: forward, backward, optimizer step.
Both take turns in every repeat; ratios are of neighbours in time, times medians. Gradients are compared bit by bit.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
from bench_gml import Engine
from bench_meta import make_batch, make_detector
from detectron2.layers import ROIAlign
from detectron2.utils.events import EventStorage
from measuring import median_ratio
from tabulate import tabulate
from torch import Tensor, nn

from lt_det.io import write_json_atomically
from lt_det.modeling import LongTailROIAlign
from lt_det.progress import progress_bar

NAMES = ("Detectron2", "lt_det")


class Iteration(Engine):
    """Gives the gradients of the step, too."""

    def __call__(self) -> list[Tensor]:
        torch.manual_seed(0)
        self.step()
        return [p.grad for p in self.module.parameters() if p.grad is not None]


def with_stock_pooling(detector: nn.Module) -> nn.Module:
    """A copy of the detector with Detectron2's ``ROIAlign``."""
    detector = copy.deepcopy(detector)
    for module in detector.modules():
        for name, align in module.named_children():
            if type(align) is LongTailROIAlign:
                how = align.output_size, align.spatial_scale, align.sampling_ratio, align.aligned
                setattr(module, name, ROIAlign(*how))
    return detector


class Pooling:
    """RoIs of 7 x 7 cells on the finest map of an image, with Detectron2's adaptive sampling."""

    def __init__(self, align: type[ROIAlign], size: int, rois: int):
        generator = torch.Generator().manual_seed(0)
        self.align = align((7, 7), 0.25, 0, True)
        self.maps = torch.randn(1, 256, size // 4, size // 4, generator=generator, requires_grad=True)
        corner = torch.rand(rois, 2, generator=generator) * size * 0.8
        extent = torch.rand(rois, 2, generator=generator) * size * 0.2 + 4
        self.rois = torch.cat([torch.zeros(rois, 1), corner, corner + extent], dim=1)

    def forward(self) -> Tensor:
        self.out = self.align(self.maps, self.rois)
        return self.out

    def backward(self) -> Tensor:
        self.maps.grad = None
        self.out.backward(self.out.detach())
        return self.maps.grad


def equal(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(map(torch.equal, a, b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=2, help="in a batch")
    parser.add_argument("--rois", type=int, default=512, help="sampled from an image; 512 in LVIS's recipes")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    ours = make_detector(args.classes, args.rois, torch.device("cpu"))
    batch = make_batch(args.size, args.images, args.classes, seed=1)
    pooling = [Pooling(align, args.size, args.rois) for align in (ROIAlign, LongTailROIAlign)]
    parts: dict[str, list[Callable]] = {
        "RoIAlign, forward": [p.forward for p in pooling],
        "RoIAlign, backward": [p.backward for p in pooling],
        "iteration": [Iteration(with_stock_pooling(ours), batch), Iteration(ours, batch)],
    }
    seconds: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part in parts}
    same = dict.fromkeys(parts, True)
    total = (args.repeats + 1) * len(parts) * len(NAMES)
    with EventStorage(), progress_bar(total=total, unit="step") as progress:
        for repeat in range(args.repeats + 1):
            for part, both in parts.items():
                found = []
                for step, times in zip(both, seconds[part]):
                    start = time.perf_counter()
                    found.append(step())
                    if repeat:  # the first warms up
                        times.append(time.perf_counter() - start)
                    progress.update()
                same[part] &= equal(*found)

    rows = [
        [part, *map(statistics.median, of), median_ratio(*of), "yes" if same[part] else "no"]
        for part, of in seconds.items()
    ]
    print(tabulate(rows, headers=["", *NAMES, "times", "same bits"], floatfmt=".3f", tablefmt="github"), end="\n\n")
    result = {
        "seconds": {part: dict(zip(NAMES, map(statistics.median, of))) for part, of in seconds.items()},
        "speedup": {part: median_ratio(*of) for part, of in seconds.items()},
        "same_bits": same,
        "setting": f"{args.images} images of {args.size} x {args.size}, {args.rois} RoIs each, {args.classes} classes, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}",
    }
    print(result["setting"])
    if args.json:
        write_json_atomically(args.json, result)


if __name__ == "__main__":
    main()
