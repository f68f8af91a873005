"""The console command ``lt-det``, and recipes by name."""

import importlib
import json
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from omegaconf import DictConfig

import lt_det
from lt_det import model_zoo
from lt_det.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2 and main(["--version"]) == 0
    assert lt_det.__version__ in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name, capsys):
    module, function, _ = COMMANDS[name]
    function = getattr(importlib.import_module(module), function)
    try:
        code = function(["--help"])
    except SystemExit as end:  # argparse
        code = end.code
    text = "".join(capsys.readouterr())
    assert code in (0, None) and text.startswith(f"usage: lt-det {name}")


def test_recipes(capsys, repo_dir):
    assert main(["recipes"]) == 0
    names = capsys.readouterr().out.split()
    assert {"lvis_balms", "glyph_gml", "lazy/mask_rcnn_vitdet_b_lvis"} <= set(names)
    assert not [n for n in names if "Base" in n]
    for name in names:
        assert model_zoo.get_config_file(name).startswith(str(repo_dir / "configs"))


def test_get_config():
    cfg = model_zoo.get_config("lvis_balms")
    assert isinstance(cfg, CfgNode) and cfg.META.NAME == "MetaReweighter"
    assert model_zoo.get_config("lvis_balms.yaml") == cfg
    lazy = model_zoo.get_config("lazy/cascade_mask_rcnn_R_50_FPN_lvis")
    assert isinstance(lazy, DictConfig) and "model" in lazy
    with pytest.raises(ValueError, match=r"'lvis_blams'; similar: lvis_balms"):
        model_zoo.get_config("lvis_blams")


def test_train_by_a_name_that_is_none(capsys):
    assert main(["train", "--config-file", "lvis_blams"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lt-det train: --config-file lvis_blams: no such file") and error.count("\n") == 1


def test_eval_of_results(tiny_paths, tmp_path, capsys):
    annotations = json.loads(Path(tiny_paths["val"].json_file).read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    results = [{**{k: a[k] for k in keys[:3]}, "score": 0.9} for a in annotations]
    (tmp_path / "r.json").write_text(json.dumps(results))
    arguments = ["--annotations", str(tiny_paths["val"].json_file), "--results", str(tmp_path / "r.json")]
    out = tmp_path / "out"
    assert main(["eval", *arguments, "--output-dir", str(out), "--no-plots", "--no-progress"]) == 0
    assert json.loads((out / "metrics.json").read_text())["bbox"]["AP"] == pytest.approx(100)
