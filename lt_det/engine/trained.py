"""What a training has left in its folder, for tools that look into trained models."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from torch import nn

from .checkpoint import LongTailCheckpointer
from .from_yaml import LongTailTrainer
from .setup import finish_config, get_lt_det_cfg

__all__ = ["annotated_test_mapper", "load_trained"]


def load_trained(folder: Path) -> tuple[CfgNode, nn.Module]:
    """The config and the detector of ``config.yaml`` and ``model_final.pth`` in a training's folder.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    config, weights = folder / "config.yaml", folder / "model_final.pth"
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give a folder that training has left")
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(config))
    finish_config(cfg)
    model = LongTailTrainer.build_trained_model(cfg)
    LongTailCheckpointer(model, strict=True).load(str(weights), checkpointables=[])
    return cfg, model


def annotated_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """A mapper that gives what a test sees, with its annotations."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.ENABLED = "none", False
    return DatasetMapper(cfg, is_train=True)
