"""``python -m lt_det.doctor``: what it sees, and that it sees what is wrong."""

import json
import sys

import pytest

from lt_det import doctor
from lt_det.doctor import check_data, check_environment, check_run, main


def levels(findings):
    return [(f.level, f.subject) for f in findings]


def test_environment():
    found = list(check_environment())
    assert ("ok", "Detectron2") in levels(found) and ("ok", "torchvision") in levels(found)
    assert not [f for f in found if f.level == "ERROR" and f.subject in ("Python", "torch", "Detectron2")]
    (detectron2,) = [f.text for f in found if f.subject == "Detectron2"]
    assert " in /" in detectron2


@pytest.mark.parametrize(("writes", "compiled"), [(False, False), (False, True), (True, False)])
def test_packages_that_every_start_compiles(monkeypatch, tmp_path, writes, compiled):
    (tmp_path / "torch.pyc").touch()
    monkeypatch.setattr(sys, "dont_write_bytecode", not writes)
    monkeypatch.setattr(
        "importlib.util.cache_from_source", lambda path: str(tmp_path / ("torch.pyc" if compiled else "none.pyc"))
    )
    notes = [f.text for f in check_environment() if f.subject == "bytecode"]
    assert len(notes) == (not writes and not compiled)
    assert all("compileall" in text for text in notes)


def test_origin_of_a_detectron2_that_hides_the_installed_one(monkeypatch, tmp_path):
    found = [f.text for f in doctor._check_detectron2() if f.subject == "Detectron2"]
    monkeypatch.setattr("detectron2.__file__", str(tmp_path / "detectron2/__init__.py"))
    (hiding,) = [f.text for f in doctor._check_detectron2() if f.subject == "Detectron2"]
    assert "from a source folder on the path, in " in hiding and hiding != found[0]


def test_a_requirement_that_is_not_met(monkeypatch):
    wanted = ["numpy>=1.24", "nothing-of-that-name>=2", "scipy>=99; extra == 'test'", "tqdm<1"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    found = {f.subject: f.text for f in doctor._check_requirements() if f.level == "ERROR"}
    assert set(found) == {"nothing-of-that-name", "tqdm"}
    assert 'pip install "nothing-of-that-name>=2"' in found["nothing-of-that-name"]


def test_data_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LT_DET_CACHE", str(tmp_path / "cache"))
    assert levels(check_data()) == [("note", "LVIS v1"), ("ok", "cache")]
    for name in ("lvis/lvis_v1_train.json", "lvis/lvis_v1_val.json", "coco/train2017/x", "coco/val2017/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert levels(check_data())[0] == ("ok", "LVIS v1")


def test_config_that_fits(tool_options):
    found = list(check_run("glyph_softmax", tool_options))
    found = [f for f in found if f.level != "note"]  # of keys without effect, and of machines without GPU
    assert levels(found) == [("ok", "config"), ("ok", "tools_train"), ("ok", "tools_val")]
    assert found[1].text == "14 images, 4 classes (3 r, 1 c, 0 f)"


def test_a_key_without_effect_is_a_note(tool_options, capfd):
    found = list(check_run("glyph_softmax", [*tool_options, "DRW.LR_FACTOR", "0.5"]))
    assert [(f.level, f.subject) for f in found if "DRW.LR_FACTOR" in f.text] == [("note", "config")]
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "options, subject, text",
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", "9"], "tools_train", "set MODEL.ROI_HEADS.NUM_CLASSES to 4"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "weights", "no such file"),
        (["MODEL.LONG_TAIL.LOSS", "Sofmax"], "config", "Softmax"),
        (["DATASETS.TEST", "('nothing',)"], "nothing", "no data set"),
    ],
)
def test_config_that_does_not(tool_options, options, subject, text):
    errors = {f.subject: f.text for f in check_run("glyph_softmax", [*tool_options, *options]) if f.level == "ERROR"}
    assert set(errors) == {subject} and text in errors[subject]


def test_class_without_images(tool_options, tiny_paths, tmp_path):
    content = json.loads(open(tiny_paths["train"].json_file).read())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 2]
    content["categories"][1].update(image_count=0, instance_count=0)
    (tmp_path / "train.json").write_text(json.dumps(content))
    entries = [("doctor_lacking", str(tmp_path / "train.json"), tiny_paths["train"].image_root)]
    options = [*tool_options, "DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('doctor_lacking',)"]
    options += ["DATASETS.TEST", "()"]
    found = list(check_run("glyph_balanced_softmax", options))
    assert levels(found)[-2:] == [("note", "doctor_lacking"), ("ERROR", "loss")]
    assert "1 class has no training image" in found[-2].text and "MIN_COUNT" in found[-1].text
    assert "ERROR" not in [f.level for f in check_run("glyph_softmax", options)]


def test_validation_set_of_other_classes(tool_options, tiny_paths, tmp_path):
    content = json.loads(open(tiny_paths["val"].json_file).read())
    content["categories"][2]["name"] = "other"
    (tmp_path / "val.json").write_text(json.dumps(content))
    entries = [("doctor_val", str(tmp_path / "val.json"), tiny_paths["val"].image_root)]
    entries.append(("doctor_train", *tiny_paths["train"]))
    options = [
        "DATASETS.REGISTER",
        str(entries),
        "DATASETS.TRAIN",
        "('doctor_train',)",
        "DATASETS.TEST",
        "('doctor_val',)",
    ]
    errors = [f for f in check_run("glyph_softmax", [*tool_options, *options]) if f.level == "ERROR"]
    assert [f.subject for f in errors] == ["doctor_val"] and "'other'" in errors[0].text


def test_command_line(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_environment", lambda: iter([doctor.Finding("ok", "Python", "3.11")]))
    assert main(["--config-file", "no_such_recipe"]) == 1
    out = capsys.readouterr().out
    assert "ERROR  config" in out and "1 to mend" in out
    assert out.startswith("```text\nok     Python") and out.count("```") == 2 and out.count("ok     Python") == 1
    with pytest.raises(SystemExit):
        main(["MODEL.WEIGHTS", "x"])
