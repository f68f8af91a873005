"""The console command ``lt-det``, and recipes by name."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig

import lt_det
from lt_det import model_zoo
from lt_det.arguments import argument_parser
from lt_det.cli import COMMANDS, main
from lt_det.tool import exit_code


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2 and main(["--version"]) == 0
    assert lt_det.__version__ in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves(repo_dir, unbuffered):
    """As of ``lt-det recipes | head -1``."""
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lt_det.cli", "recipes"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=repo_dir, env=env, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


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


IMPORTED = """
import sys
from lt_det.cli import main

for argv in {commands}:
    try:
        main(argv)
    except SystemExit:
        pass
heavy = ("torch", "torchvision", "detectron2", "detectron2.data", "numba", "matplotlib", "plotly", "cv2", "scipy")
print("\\nimported:", *[name for name in heavy if name in sys.modules])
"""


def imported_by(*commands: list[str]) -> list[str]:
    """What takes long to import, of that which commands in a new process have imported."""
    code = IMPORTED.format(commands=list(commands))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_commands_import_what_they_need(tiny_paths, tmp_path):
    annotations = str(tiny_paths["val"].json_file)
    assert imported_by(*([name, "--help"] for name in COMMANDS), ["recipes"], ["train", "--no-such-flag"]) == []
    assert imported_by(["convert", "lvis", annotations, str(tmp_path / "lvis.json")]) == []
    assert (tmp_path / "lvis.json").is_file()
    inspect = ["inspect", "--annotations", annotations, "--output", str(tmp_path / "page.html"), "--no-progress"]
    found = imported_by(inspect)
    assert (tmp_path / "page.html").is_file()
    assert "plotly" in found and not {"torchvision", "detectron2.data", "numba", "matplotlib"} & set(found)


def test_arguments_are_those_of_detectron2():
    def declared(parser) -> dict:
        return {
            tuple(a.option_strings) or a.dest: (a.dest, a.default, a.type, a.nargs, a.required) for a in parser._actions
        }

    ours, theirs = declared(argument_parser()), declared(default_argument_parser())
    assert {k: v for k, v in ours.items() if k != ("--overwrite",)} == theirs
    args = argument_parser().parse_args(["--num-gpus", "2", "A.B", "1", "--resume", "C", "--eval-only"])
    assert (args.num_gpus, args.resume, args.eval_only, args.opts) == (2, True, True, ["A.B", "1", "C"])


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no"), KeyError("no"), ImportError("no")])
def test_input_that_cannot_be_used_ends_in_one_line(error, capsys, monkeypatch):
    def work():
        raise error

    assert exit_code("lt-det x", work) == 2
    assert capsys.readouterr().err == "lt-det x: no\n"
    monkeypatch.setenv("LT_DET_TRACEBACK", "1")
    with pytest.raises(type(error)):
        exit_code("lt-det x", work)


def test_other_errors_of_a_command_stay(capsys):
    for error in (TypeError("no"), BrokenPipeError("no")):

        def work(error=error):
            raise error

        with pytest.raises(type(error)):
            exit_code("lt-det x", work)
    assert exit_code("lt-det x", lambda: 1) == 1 and exit_code("lt-det x", lambda: None) == 0
    assert capsys.readouterr().err == ""
