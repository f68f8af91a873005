"""Data: class statistics, data sets, samplers and a train loader that resumes where it stopped."""

from .build import (
    TrainLoader,
    build_train_loader,
    build_train_loader_from_config,
    build_train_mapper,
    check_num_classes,
    load_train_dicts,
    open_datasets,
    training_frequency_groups,
)
from .class_statistics import PRIOR_SOURCES, ClassStatistics, group_letters
from .copy_paste import CopyPaste, CopyPasteMapper
from .dataset_pass import pass_over
from .datasets import (
    load_lvis_or_coco_json,
    open_dataset,
    prepare_dataset,
    register_builtin,
    register_dataset,
    register_from_config,
    require_dataset,
)
from .fractal import fractal_dimensions
from .mapper import IdentifyingMapper, TrainMapper
from .meta_sampler import MetaSampler
from .records import DatasetRecords, MappedDataset, RecordPositions, annotation_columns, images_that_fill
from .samplers import (
    SAMPLER_REGISTRY,
    ClassBalancedSampler,
    InOrderSampler,
    InstanceAwareRepeatFactorSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
    build_sampler,
    class_balanced_repeat_factors,
    expected_counts,
    instance_aware_repeat_factors,
    repeat_factors_from_category_frequency,
    sampler_by_name,
    samplers_with_options,
)

__all__ = [
    "PRIOR_SOURCES",
    "SAMPLER_REGISTRY",
    "ClassBalancedSampler",
    "ClassStatistics",
    "CopyPaste",
    "CopyPasteMapper",
    "DatasetRecords",
    "IdentifyingMapper",
    "InOrderSampler",
    "InstanceAwareRepeatFactorSampler",
    "MappedDataset",
    "MetaSampler",
    "RandomSubsetTrainingSampler",
    "RecordPositions",
    "RepeatFactorTrainingSampler",
    "TrainLoader",
    "TrainMapper",
    "TrainingSampler",
    "annotation_columns",
    "build_sampler",
    "build_train_loader",
    "build_train_loader_from_config",
    "build_train_mapper",
    "check_num_classes",
    "class_balanced_repeat_factors",
    "expected_counts",
    "fractal_dimensions",
    "group_letters",
    "images_that_fill",
    "instance_aware_repeat_factors",
    "load_lvis_or_coco_json",
    "load_train_dicts",
    "open_dataset",
    "open_datasets",
    "pass_over",
    "prepare_dataset",
    "register_builtin",
    "register_dataset",
    "register_from_config",
    "repeat_factors_from_category_frequency",
    "require_dataset",
    "sampler_by_name",
    "samplers_with_options",
    "training_frequency_groups",
]
