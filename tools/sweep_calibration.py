#!/usr/bin/env python
"""Evaluate a trained model under many strengths of a calibrator, running it once.

    tools/sweep_calibration.py --config-file configs/lvis_softmax.yaml --calibrator LogitAdjustment \\
        --values 0 0.25 0.5 0.75 1.0 --num-gpus 8 MODEL.WEIGHTS output/lvis_softmax/model_final.pth

Works on stock Detectron2 checkpoints too (a config with lt_det's ROI heads and the checkpoint's classes). The
calibrator's other options are config keys (MODEL.LONG_TAIL.CALIBRATOR.PRIOR, BACKGROUND, ...). Prints the table and
writes sweep.json and sweep.png to OUTPUT_DIR/calibration_<calibrator>; --reuse evaluates once more what an earlier run
stored there.
"""

import os

from detectron2.utils import comm

from lt_det.engine import LongTailCheckpointer, LongTailTrainer, argument_parser, launch_main, setup
from lt_det.engine.calibration_sweep import calibration_sweep, format_sweep
from lt_det.modeling import CALIBRATOR_REGISTRY


def main(args):
    args.eval_only = True
    cfg = setup(args)
    model = None
    if not args.reuse:
        model = LongTailTrainer.build_trained_model(cfg)
        LongTailCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    output_dir = os.path.join(cfg.OUTPUT_DIR, f"calibration_{args.calibrator}")
    rows = calibration_sweep(cfg, model, args.calibrator, args.values, output_dir, reuse=args.reuse)
    if comm.is_main_process():
        print("\n" + format_sweep(rows, CALIBRATOR_REGISTRY.get(args.calibrator).parameter))
        print(f"\n* highest AP. In {output_dir}: sweep.json, sweep.png")
    return rows


def number(text):
    try:
        return float(text)
    except ValueError:
        return None


def parse(argv=None):
    parser = argument_parser()
    names = sorted(name for name, _ in CALIBRATOR_REGISTRY)
    parser.add_argument("--calibrator", choices=names, default="LogitAdjustment", help="what calibrates the scores")
    parser.add_argument(
        "--values",
        nargs="+",
        default=["0", "0.25", "0.5", "0.75", "1"],
        help="strengths; 0: as trained",
    )
    parser.add_argument("--reuse", action="store_true", help="do not run the model: evaluate the stored detections")
    args = parser.parse_args(argv)
    # argparse hands --values all that follows it, KEY VALUE pairs too.
    end = next((i for i, text in enumerate(args.values) if number(text) is None), len(args.values))
    if end == 0:
        parser.error(f"--values: {args.values[0]!r} is not a number")
    args.opts = args.values[end:] + args.opts
    args.values = [number(text) for text in args.values[:end]]
    return args


if __name__ == "__main__":
    launch_main(main, parse())
