"""Cascade Mask R-CNN R50-FPN on LVIS v1 with Seesaw loss in all three stages."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from lt_det.losses import Seesaw
from lt_det.modeling import LongTailCascadeROIHeads, LongTailOutputLayers, NormalizedMaskRCNNConvUpsampleHead

from .lvis_data import dataloader  # noqa: F401  (a part of this config)

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
model.roi_heads.num_classes = 1203
model.roi_heads.box_predictors = [
    L(LongTailOutputLayers)(
        input_shape=ShapeSpec(channels=1024),
        box2box_transform=L(Box2BoxTransform)(weights=(w, w, w / 2, w / 2)),
        num_classes="${...num_classes}",
        cls_agnostic_bbox_reg=True,
        test_score_thresh=0.0001,
        test_topk_per_image=300,
        # A loss with a class prior also takes statistics=L(dataset_statistics)(name="lvis_v1_train").
        loss=L(Seesaw)(num_classes="${....num_classes}"),
        classifier="cosine",
        classifier_options=dict(scale=20.0, bias=True),
    )
    for w in (10, 20, 30)
]
model.roi_heads._target_ = LongTailCascadeROIHeads
model.roi_heads.mask_head._target_ = NormalizedMaskRCNNConvUpsampleHead

train = model_zoo.get_config("common/train.py").train
train.output_dir = "./output/lazy_cascade_mask_rcnn_R_50_FPN_lvis"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.seed = 1
train.max_iter = 180000
train.eval_period = 30000

optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[120000, 160000, 180000]),
    warmup_length=1000 / 180000,
    warmup_factor=0.001,
)
