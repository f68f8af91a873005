"""Writes one HTML page of an evaluated model, or of two side by side; it opens in a browser without a network.

    tools/report.py output/run/inference --annotations val.json --image-root images --output report.html
    tools/report.py a_results.json b_results.json --annotations val.json --output a_and_b.html

A run is the folder that an evaluation wrote (OUTPUT_DIR/inference), or a results file of any model, which is evaluated
first. On the page: AP by group and category, precision-recall, TIDE's errors and which class takes another's objects
(both under LVIS's federated rules), calibration, thresholds of best F1, classifier weights, the worst and best images.
The thresholds stand in a csv beside the page, too, which lt-det predict takes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

from lt_det.tool import exit_code

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    """The arguments of ``lt-det report``."""
    parser = argparse.ArgumentParser(
        prog="lt-det report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one or two: folder of an evaluation, or results file")
    parser.add_argument("--annotations", required=True, metavar="GT.json", help="ground truth json")
    parser.add_argument("--output", required=True, metavar="PAGE.html", help="the page to write")
    parser.add_argument("--image-root", default="", metavar="DIR", help="folder of the images, for pictures")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="CHECKPOINT",
        help="checkpoint of each run, for the lengths of the classifier's weights",
    )  # fmt: skip
    parser.add_argument("--iou-type", choices=["bbox", "segm"], help="what charts are about (default: masks, if any)")
    parser.add_argument("--images", type=int, default=6, help="worst and best images to show, each (default: 6)")
    parser.add_argument("--replicates", type=int, default=1000, help="draws of the bootstrap of two runs")
    parser.add_argument("--coco-rules", action="store_true", help="ignore federated fields: every image is exhaustive")
    parser.add_argument("--title", default="", help="of the page")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``lt-det report`` and ``tools/report.py``; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        parser.error("a report is of one run, or of two side by side")
    if args.weights and len(args.weights) != len(args.runs):
        parser.error("--weights takes one checkpoint for each run")
    if args.images < 0 or args.replicates < 1:
        parser.error("--images must be 0 or more, --replicates 1 or more")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    return exit_code("lt-det report", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Writes the page and prints its name."""
    begin = time.perf_counter()
    from lt_det.evaluation import GroundTruth
    from lt_det.report.evaluation_report import thresholds_path, write_report

    weights = []
    if args.weights:
        from lt_det.engine.checkpoint import read_weights  # and with it Detectron2, for seconds

        weights = [read_weights(path) for path in args.weights]
    gt = GroundTruth.from_json(
        args.annotations, with_masks=args.iou_type != "bbox", federated=False if args.coco_rules else None
    )
    write_report(
        gt, args.runs, args.output, annotations=args.annotations, image_root=args.image_root, weights=weights,
        iou_type=args.iou_type or "", images=args.images, replicates=args.replicates, title=args.title,
        progress=not args.no_progress and sys.stderr.isatty(),
    )  # fmt: skip
    size, seconds = os.path.getsize(args.output) / 1e6, time.perf_counter() - begin
    print(f"wrote {args.output} ({size:.1f} MB, {seconds:.1f} s) and {thresholds_path(args.output)}")
