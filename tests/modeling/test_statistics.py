"""Class statistics of a run: read once for all who ask, and anew when their source has changed."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform

from lt_det.config import get_lt_det_cfg
from lt_det.data import register_dataset
from lt_det.losses import BalancedSoftmax
from lt_det.modeling import (
    LongTailOutputLayers,
    NorCal,
    box_predictors,
    dataset_statistics,
    statistics,
    statistics_from_config,
)


@pytest.fixture
def cfg(tiny_paths, tiny_model_options, repo_dir):
    register_dataset("tiny_train", tiny_paths["train"].json_file, tiny_paths["train"].image_root)
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(repo_dir / "configs/glyph_logit_adjusted.yaml"))
    cfg.merge_from_list([*tiny_model_options, "DATASETS.TRAIN", ("tiny_train",), "MODEL.DEVICE", "cpu"])
    return cfg


@pytest.fixture
def readings(monkeypatch):
    """How often the training set was opened."""
    found = []
    original = statistics.load_train_dicts
    monkeypatch.setattr(statistics, "load_train_dicts", lambda cfg: found.append(1) or original(cfg))
    statistics._answer.cache_clear()
    return found


def test_a_cascade_reads_the_training_set_once(cfg, readings):
    cfg.merge_from_list([
        "MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads", "MODEL.LONG_TAIL.PRIOR", "sampled",
        "MODEL.LONG_TAIL.CALIBRATOR.NAME", "NorCal", "MODEL.LONG_TAIL.CALIBRATOR.PRIOR", "sampled",
        "DATALOADER.REPEAT_THRESHOLD", 0.5,
    ])  # fmt: skip
    predictors = list(box_predictors(build_model(cfg)))
    assert len(predictors) == 3 and not readings
    for predictor in predictors:
        predictor.loss.prepare()
        predictor.calibrator.log_weights(4)
    assert len(readings) == 1
    first = predictors[0].loss.class_statistics()
    assert all(p.loss.class_statistics() is first for p in predictors)
    # Under another sampler it sees other counts.
    other = statistics_from_config(cfg, sampler_name="TrainingSampler", prior="sampled")
    assert len(readings) == 2 and not np.allclose(other.prior("sampled"), first.prior("sampled"))
    assert statistics_from_config(cfg, sampler_name="TrainingSampler", prior="sampled") is other
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    assert statistics_from_config(cfg, prior="sampled") is not first and len(readings) == 3


def test_a_file_that_is_written_anew(cfg, tiny_paths, tmp_path):
    source = tmp_path / "train.json"
    cfg.DATASETS.TRAIN = (f"train of {tmp_path}",)
    shutil.copy(tiny_paths["train"].json_file, source)
    for halve in (False, True):
        if halve:
            content = json.loads(source.read_text())
            content["annotations"] = content["annotations"][::2]
            source.write_text(json.dumps(content))
        register_dataset(cfg.DATASETS.TRAIN[0], source, tiny_paths["train"].image_root)
        counted = statistics_from_config(cfg)
        ids = [a["category_id"] for a in json.loads(source.read_text())["annotations"]]
        assert counted.instance_count.tolist() == np.bincount(ids, minlength=5)[1:].tolist()
        assert dataset_statistics(cfg.DATASETS.TRAIN[0])() == counted
        assert statistics_from_config(cfg) is counted
    counted.to_json(tmp_path / "own.json")
    cfg.MODEL.LONG_TAIL.STATISTICS = str(tmp_path / "own.json")
    assert statistics_from_config(cfg) == counted


def test_copies_of_a_lazy_predictor(cfg):
    """A model is pickled and copied with what gives its loss and calibrator their statistics."""
    source = L(dataset_statistics)(
        name="tiny_train", sampler="RepeatFactorTrainingSampler", sampler_options={"repeat_threshold": 0.5}
    )
    layers = instantiate(
        L(LongTailOutputLayers)(
            input_shape=ShapeSpec(channels=8),
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes=4,
            loss=L(BalancedSoftmax)(num_classes=4, statistics=source, prior="sampled"),
            calibrator=L(NorCal)(statistics=source),
        )
    )
    copies = pickle.loads(pickle.dumps(layers)), copy.deepcopy(layers)  # before the data set is read
    expected = layers.loss.class_statistics()
    assert expected.sampled_count is not None
    for twin in (*copies, pickle.loads(pickle.dumps(layers)), copy.deepcopy(layers)):
        assert twin.loss.class_statistics() == expected
        assert torch.equal(twin.calibrator.log_weights(4), layers.calibrator.log_weights(4))


def test_lazy_config(cfg, monkeypatch):
    calls = []
    original = statistics.get_detection_dataset_dicts
    monkeypatch.setattr(statistics, "get_detection_dataset_dicts", lambda n: calls.append(n) or original(n))
    statistics._answer.cache_clear()
    options = {"repeat_threshold": 0.5}
    three = [
        dataset_statistics("tiny_train", sampler="RepeatFactorTrainingSampler", sampler_options=options)
        for _ in range(3)
    ]
    assert three[0]() is three[1]() is three[2]() and calls == ["tiny_train"]
    assert dataset_statistics("tiny_train")().sampled_count is None
