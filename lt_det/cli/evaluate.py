"""Evaluates the results of any model on an LVIS- or COCO-style data set.

    tools/evaluate_lvis.py --annotations lvis_v1_val.json --results results.json --output-dir output/eval

Results: a COCO/LVIS results json (Detectron2's lvis_instances_results.json, mmdetection's .bbox.json and .segm.json;
gzip too), or Detectron2's instances_predictions.pth. Several files are evaluated one after another, each on what it
carries. Numbers agree with the official LVIS API (COCO-style annotations: with pycocotools).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time

from lt_det.tool import exit_code


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lt-det eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, metavar="GT.json", help="ground truth json (gzip too)")
    parser.add_argument("--results", required=True, nargs="+", metavar="RESULTS", help="results of the model")
    parser.add_argument(
        "--output-dir", required=True, metavar="OUT", help="for metrics.json, per_category.csv and plots"
    )
    parser.add_argument(
        "--iou-types",
        nargs="+",
        choices=["bbox", "segm", "boundary"],
        help="default: bbox and segm, as the results carry",
    )
    parser.add_argument(
        "--max-dets", type=int, help="detections an image (LVIS: 300), or an image and category (COCO: 100)"
    )
    parser.add_argument(
        "--ap-fixed", action="store_true", help="add AP-fixed (10,000 detections a category) and AP-pool"
    )
    parser.add_argument(
        "--segm-area", choices=["official", "mask", "box"], default="official",
        help="area of a detected mask for APs, APm, APl: the official API takes the box's "
        "when results carry boxes; Detectron2's evaluator always the mask's",
    )  # fmt: skip
    parser.add_argument("--coco-rules", action="store_true", help="ignore federated fields: every image is exhaustive")
    parser.add_argument("--skip-invalid", action="store_true", help="leave out results that cannot be evaluated")
    parser.add_argument(
        "--frequency-groups",
        metavar="FILE",
        help='json {"r": [category ids], "c": [..], "f": [..]} in place of the annotations\'',
    )
    parser.add_argument("--no-plots", action="store_true", help="write no plots")
    parser.add_argument("--tensorboard", metavar="DIR", help="write the metrics as scalars there")
    parser.add_argument("--step", type=int, default=0, help="step of the TensorBoard scalars")
    parser.add_argument("--threads", type=int, help="default: number of processors, at most 8")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    return exit_code("lt-det eval", lambda: evaluate(args))


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates the files, writes what the arguments ask for and prints the metrics."""
    from lt_det.evaluation import GroundTruth, evaluate_results, format_metrics
    from lt_det.evaluation.report import save_report, write_tensorboard

    begin = time.perf_counter()
    groups = None
    if args.frequency_groups:
        with open(args.frequency_groups, encoding="utf-8") as f:
            groups = json.load(f)
    boxes_only = args.iou_types == ["bbox"]
    gt = GroundTruth.from_json(
        args.annotations,
        with_masks=not boxes_only,
        federated=False if args.coco_rules else None,
        frequency_groups=groups,
    )
    metrics, details = {}, {}
    for path in args.results:
        evaluation = evaluate_results(
            gt,
            path,
            iou_types=args.iou_types,
            max_dets=args.max_dets,
            ap_fixed=args.ap_fixed,
            segm_area=args.segm_area,
            skip_invalid=args.skip_invalid,
            num_threads=args.threads,
            progress=not args.no_progress,
        )
        twice = set(metrics) & set(evaluation.metrics)
        if twice:
            raise ValueError(
                f"{sorted(twice)} come from {path} and from a file before it; name --iou-types, or one file."
            )
        metrics.update(evaluation.metrics)
        details.update(evaluation.details())
    save_report(args.output_dir, gt, metrics, details, plots=not args.no_plots)
    if args.tensorboard:
        write_tensorboard(args.tensorboard, metrics, args.step)
    print(format_metrics(metrics))
    print(f"\n{time.perf_counter() - begin:.1f} s; wrote {os.path.join(args.output_dir, 'metrics.json')}")
