"""LVIS v1 for LazyConfig: lt_det's resumable loader with repeat-factor sampling, and its evaluator."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader
from omegaconf import OmegaConf

from lt_det.data import TrainMapper, build_train_loader, open_datasets
from lt_det.evaluation import LongTailLVISEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset_dicts=L(open_datasets)(names="lvis_v1_train"),
    mapper=L(TrainMapper)(
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(
                short_edge_length=(640, 672, 704, 736, 768, 800), sample_style="choice", max_size=1333
            ),
            L(T.RandomFlip)(horizontal=True),
        ],
        image_format="BGR",
        use_instance_mask=True,
    ),
    # Any name in lt_det.data.SAMPLER_REGISTRY, or a sampler of your own as L(...).
    sampler="RepeatFactorTrainingSampler",
    sampler_options=dict(repeat_threshold=0.001),
    total_batch_size=16,
    num_workers=4,
    seed="${train.seed}",
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(open_datasets)(names="lvis_v1_val", filter_empty=False),
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(LongTailLVISEvaluator)(
    dataset_name="${..test.dataset.names}", tasks=("bbox", "segm"), output_dir="${train.output_dir}/inference"
)
