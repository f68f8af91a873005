#!/usr/bin/env python
"""Mean and deviation of a trained model's logits, which the calibrator LogN needs, by one pass over training images.

    tools/fit_logn.py --config-file configs/lvis_softmax.yaml --num-gpus 8 MODEL.WEIGHTS output/model_final.pth

writes output/model_final.logn.json, where LogN looks for it:

    tools/train_net.py --eval-only --config-file configs/lvis_logn.yaml MODEL.WEIGHTS output/model_final.pth
"""

from detectron2.utils import comm

from lt_det.engine import LongTailCheckpointer, LongTailTrainer, argument_parser, launch_main, setup
from lt_det.engine.logit_moments import fit_moments
from lt_det.modeling.calibrators import moments_path, write_moments


def main(args):
    args.eval_only = True
    cfg = setup(args)
    model = LongTailTrainer.build_trained_model(cfg)
    LongTailCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    path = args.output or moments_path(cfg.MODEL.WEIGHTS)
    if not path:
        raise ValueError(f"MODEL.WEIGHTS is the address {cfg.MODEL.WEIGHTS}; name a file by --output")
    moments = fit_moments(cfg, model, images=args.images)
    if comm.is_main_process():
        write_moments(path, moments)
        print(f"{path}: moments of {' + '.join(str(m.rois) for m in moments)} RoIs")


def parse(argv=None):
    parser = argument_parser()
    parser.add_argument("--images", type=int, default=0, help="so many images, evenly spread; 0: all of DATASETS.TRAIN")
    parser.add_argument("--output", help="json file; default beside MODEL.WEIGHTS, where LogN looks for it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch_main(main, parse())
