#!/usr/bin/env python
"""Mean and deviation of a trained model's logits, which the calibrator LogN needs, by one pass over training images.

    tools/fit_logn.py --config-file configs/lvis_softmax.yaml --num-gpus 8 MODEL.WEIGHTS output/model_final.pth

writes output/model_final.logn.json, where LogN looks for it:

    tools/train_net.py --eval-only --config-file configs/lvis_logn.yaml MODEL.WEIGHTS output/model_final.pth

A LazyConfig takes its own words: --config-file mine.py train.init_checkpoint=output/model_final.pth
"""

from functools import partial

from detectron2.utils import comm

from lt_det.engine import LongTailCheckpointer, LongTailTrainer, argument_parser, launch_main, setup
from lt_det.engine.from_lazy import images_from_lazy
from lt_det.engine.from_yaml import images_from_config
from lt_det.engine.lazy import build_trained_lazy, setup_lazy
from lt_det.engine.logit_moments import fit_moments
from lt_det.modeling.calibrators import moments_path, write_moments


def main(args):
    args.eval_only = True
    if args.config_file.endswith(".py"):
        cfg = setup_lazy(args)
        model, images = build_trained_lazy(cfg), partial(images_from_lazy, cfg)
        weights, key = cfg.train.init_checkpoint, "train.init_checkpoint"
    else:
        cfg = setup(args)
        model, images = LongTailTrainer.build_trained_model(cfg), partial(images_from_config, cfg)
        weights, key = cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS"
    LongTailCheckpointer(model, strict=True, weights_key=key).load(weights, checkpointables=[])
    path = args.output or moments_path(weights)
    if not path:
        raise ValueError(f"{key} is the address {weights}; name a file by --output")
    moments = fit_moments(images, model, images=args.images)
    if comm.is_main_process():
        write_moments(path, moments)
        print(f"{path}: moments of {' + '.join(str(m.rois) for m in moments)} RoIs")


def parse(argv=None):
    parser = argument_parser()
    parser.add_argument("--images", type=int, default=0, help="so many images, evenly spread; 0: all")
    parser.add_argument("--output", help="json file; default beside the checkpoint, where LogN looks for it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch_main(main, parse())
