#!/usr/bin/env python
"""Train and evaluate with a LazyConfig.

Train:      tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_vitdet_b_lvis.py --num-gpus 8
Resume:     ... --resume
Evaluate:   ... --eval-only train.init_checkpoint=output/.../model_final.pth
Change:     ... optimizer.lr=0.01 train.max_iter=1000
"""

from lt_det.engine import launch_main
from lt_det.engine.lazy import main_lazy

if __name__ == "__main__":
    launch_main(main_lazy)
