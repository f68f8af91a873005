"""Recipes: a method is stated once, under configs/methods, and runs are a base plus a method."""

import re
from pathlib import Path

import detectron2
import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from lt_det import model_zoo
from lt_det.config import add_lt_det_config
from lt_det.engine.setup import merged_config

ROOT = model_zoo.config_folder()
METHODS = sorted(path.stem for path in ROOT.glob("methods/*.yaml"))


def plain(path):
    """As a script of Detectron2's own does it."""
    cfg = get_cfg()
    add_lt_det_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value(node, key):
    for part in key.split("."):
        node = node[part]
    return node


def test_every_method_has_both_runs():
    names = {path.stem for path in ROOT.glob("*.yaml") if not path.name.startswith("Base-")}
    assert names == {f"{data}_{method}" for data in ("lvis", "glyph") for method in METHODS}


@pytest.mark.parametrize("data", ["lvis", "glyph"])
@pytest.mark.parametrize("method", METHODS)
def test_run_is_base_and_method(data, method):
    """The run says what its data set asks for, and nothing that base and method say already."""
    content = yaml.safe_load((ROOT / f"{data}_{method}.yaml").read_text())
    base, stated = content.pop("_BASE_")
    assert stated == f"methods/{method}.yaml"
    assert base.startswith({"lvis": ("Base-LVIS", "lvis_"), "glyph": ("Base-glyph", "glyph_")}[data])
    assert content.pop("OUTPUT_DIR") == f"output/{data}_{method}"
    cfg = get_cfg()
    add_lt_det_config(cfg)
    for part in (base, stated):
        cfg.merge_from_file(str(ROOT / part))
    run = plain(ROOT / f"{data}_{method}.yaml")
    alone = dict(flat(CfgNode.load_yaml_with_base(str(ROOT / stated), allow_unsafe=True)))
    for key, new in flat(content):
        assert value(cfg, key) != value(run, key), f"{key} is {new} without the run's file"
    mine = dict(flat(content))
    for key, told in alone.items():
        if key not in mine:
            assert value(run, key) == value(CfgNode({"A": told}), "A"), f"{key} of methods/{method}.yaml is lost"
    choices = r"LOSS|PRIOR|BACKGROUND|.*\.NAME|SAMPLER_TRAIN|ENABLED|CLASSIFIER\..*"
    assert not [key for key in mine if re.fullmatch(rf"(.*\.)?({choices})", key)], "what the method is"
    assert plain(ROOT / f"{data}_{method}.yaml") == model_zoo.get_config(f"{data}_{method}")


def test_users_files(tmp_path):
    """A recipe in _BASE_, and a method beside a base of the user's own."""
    (tmp_path / "one.yaml").write_text(f"_BASE_: {ROOT}/lvis_balms.yaml\nOUTPUT_DIR: out\n")
    cfg, recipe = plain(tmp_path / "one.yaml"), model_zoo.get_config("lvis_balms")
    recipe.OUTPUT_DIR = "out"
    assert cfg == recipe
    (tmp_path / "mine.yaml").write_text("MODEL:\n  ROI_HEADS:\n    NAME: LongTailROIHeads\n    NUM_CLASSES: 7\n")
    (tmp_path / "two.yaml").write_text(f"_BASE_: [mine.yaml, {ROOT}/methods/seesaw.yaml]\n")
    cfg = plain(tmp_path / "two.yaml")
    assert (cfg.MODEL.LONG_TAIL.LOSS, cfg.MODEL.LONG_TAIL.CLASSIFIER.NAME) == ("Seesaw", "cosine")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 7


def test_a_base_by_its_recipes_name(tmp_path):
    """As in a folder of one's own, without the checkout: by name, beside a file, and in a file that is a base."""
    (tmp_path / "one.yaml").write_text("_BASE_: lvis_balms\nOUTPUT_DIR: out\n")
    cfg, recipe = merged_config(str(tmp_path / "one.yaml"), []), model_zoo.get_config("lvis_balms")
    recipe.OUTPUT_DIR = "out"
    assert cfg == recipe
    (tmp_path / "two.yaml").write_text("_BASE_: [one.yaml, methods/seesaw]\n")
    cfg = merged_config(str(tmp_path / "two.yaml"), [])
    assert (cfg.MODEL.LONG_TAIL.LOSS, cfg.OUTPUT_DIR) == ("Seesaw", "out")
    # A file goes before the recipe of its name.
    (tmp_path / "glyph_softmax.yaml").write_text("OUTPUT_DIR: mine\n")
    (tmp_path / "three.yaml").write_text("_BASE_: glyph_softmax.yaml\n")
    assert merged_config(str(tmp_path / "three.yaml"), []).OUTPUT_DIR == "mine"
    # Detectron2's own, with a method of lt_det's on it.
    zoo = "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x.yaml"
    if (
        Path(detectron2.__file__).parent / "model_zoo/configs" / zoo
    ).is_file():  # not where Detectron2 is a source folder on the path
        (tmp_path / "zoo.yaml").write_text(f"_BASE_: [{zoo}, methods/seesaw]\n")
        cfg = merged_config(str(tmp_path / "zoo.yaml"), [])
        assert (cfg.MODEL.LONG_TAIL.LOSS, cfg.SOLVER.MAX_ITER) == ("Seesaw", 90000)
    (tmp_path / "four.yaml").write_text("_BASE_: lvis_blams\n")
    with pytest.raises(FileNotFoundError, match=r"four\.yaml: _BASE_ lvis_blams is no file .* similar: lvis_balms"):
        merged_config(str(tmp_path / "four.yaml"), [])
