#!/usr/bin/env python
"""Train and evaluate with a yaml config.

Train:      tools/train_net.py --config-file configs/lvis_balms.yaml --num-gpus 8
Resume:     ... --resume
Evaluate:   ... --eval-only MODEL.WEIGHTS output/model_final.pth
Change:     ... SOLVER.BASE_LR 0.01 MODEL.LONG_TAIL.LOSS BalancedSoftmax
"""

from lt_det.engine import launch_main, main

if __name__ == "__main__":
    launch_main(main)
