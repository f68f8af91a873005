"""Small detectors and inputs for the modeling tests."""

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.structures import BitMasks, Boxes, Instances

from lt_det.engine import get_lt_det_cfg

# Detectron2's own configs, and what a user changes in them.
SWAPS = {
    "standard": ("LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "LongTailROIHeads"),
    "cascade": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "LongTailCascadeROIHeads"),
    "c4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", "LongTailRes5ROIHeads"),
}


@pytest.fixture
def stock_cfg():
    """Detectron2's own config for a kind of ROI heads, on the CPU, narrow, with few proposals and 20 classes."""

    def build(kind: str):
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(model_zoo.get_config_file(SWAPS[kind][0]))
        cfg.merge_from_list([
            "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 20,
            "MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
            "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
            "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1e-4,
            # A random trunk with frozen batch norm amplifies its input until all scores saturate.
            "MODEL.PIXEL_STD", [1e4, 1e4, 1e4],
            "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST",
            20, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
        ])  # fmt: skip
        return cfg

    return build


@pytest.fixture
def swap():
    """Make a stock config long-tailed: the few keys that a user changes."""

    def apply(cfg, kind: str, loss: str = "Softmax"):
        cfg = cfg.clone()
        cfg.merge_from_list(["MODEL.ROI_HEADS.NAME", SWAPS[kind][1], "MODEL.LONG_TAIL.LOSS", loss])
        return cfg

    return apply


@pytest.fixture
def statistics_file(tmp_path):
    """Class statistics of 20 classes with 1 to 1000 training images."""
    from lt_det.data import ClassStatistics

    counts = np.round(np.geomspace(1, 1000, 20)).astype(np.int64)
    statistics = ClassStatistics(counts, counts * 2, 2000, tuple(f"class {i}" for i in range(20)))
    statistics.to_json(tmp_path / "statistics.json")
    return str(tmp_path / "statistics.json")


@pytest.fixture
def batch():
    """Two images with instances and one without."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for num in (3, 0, 2):
        corners = torch.rand(num, 2, generator=generator) * 40
        boxes = torch.cat([corners, corners + 20 + torch.rand(num, 2, generator=generator) * 40], dim=1)
        masks = torch.zeros(num, 96, 128, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist()):
            mask[y0:y1, x0:x1] = True
        instances = Instances((96, 128))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, 20, (num,), generator=generator)
        instances.gt_masks = BitMasks(masks)
        image = (torch.rand(3, 96, 128, generator=generator) * 255).to(torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": 96, "width": 128})
    return inputs
