"""Mask R-CNN with a plain ViT-B (ViTDet) on LVIS v1, 100 epochs, and the federated loss as in the authors' recipe.

Balanced softmax instead: model.roi_heads.box_predictor.loss = L(BalancedSoftmax)(num_classes="${...num_classes}",
statistics=L(dataset_statistics)(name="lvis_v1_train")).
"""

from functools import partial

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from lt_det.losses import Federated
from lt_det.modeling import LongTailMaskHead, LongTailOutputLayers, LongTailROIHeads, dataset_statistics

from .lvis_data import dataloader

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.roi_heads.num_classes = 1203
model.roi_heads.box_predictor = L(LongTailOutputLayers)(
    input_shape=ShapeSpec(channels=1024),
    box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
    num_classes="${..num_classes}",
    test_score_thresh=0.02,
    test_topk_per_image=300,
    # With the output that Detectron2 never trains, so that its ViTDet checkpoints fit.
    loss=L(Federated)(
        num_classes="${...num_classes}",
        statistics=L(dataset_statistics)(name="lvis_v1_train"),
        background_column=True,
    ),
)

# Large-scale jitter on squares of 1024 pixels, 64 images a batch.
IMAGE_SIZE = 1024
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=IMAGE_SIZE, target_width=IMAGE_SIZE),
    L(T.FixedSizeCrop)(crop_size=(IMAGE_SIZE, IMAGE_SIZE), pad=False),
]
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True  # crops cut them
dataloader.train.total_batch_size = 64
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=IMAGE_SIZE, max_size=IMAGE_SIZE)]
model.roi_heads._target_ = LongTailROIHeads
model.roi_heads.mask_head._target_ = LongTailMaskHead

train = model_zoo.get_config("common/train.py").train
train.output_dir = "./output/lazy_mask_rcnn_vitdet_b_lvis"
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
train.seed = 1
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = 156250  # 100 epochs of 100,000 images
train.eval_period = 30000

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 2e-4
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[138889, 150463], num_updates=156250),
    warmup_length=250 / 156250,
    warmup_factor=0.001,
)
