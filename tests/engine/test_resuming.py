"""Runs and their checkpoints: damaged files, other classes, other keys, old output folders."""

import argparse
import json
import logging
import os
import pickle
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from lt_det.data import register_dataset
from lt_det.engine import LongTailCheckpointer, argument_parser, main, setup
from lt_det.engine.checkpoint import UnreadableCheckpoint, check_test_classes, checkpoint_files
from lt_det.engine.lazy import main_lazy
from lt_det.engine.run_record import RunRecord
from lt_det.engine.setup import prepare_output


@pytest.fixture
def warnings(caplog, monkeypatch):
    """``warnings()``: what was logged as a warning so far."""
    for name in ("lt_det", "fvcore"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---- damaged files, on a model of one layer


class _State:
    def __init__(self, iteration=0):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the iterations 1, 2 and 3; the weights are the iteration's number."""
    model, trainer = torch.nn.Linear(2, 2), _State()
    checkpointer = LongTailCheckpointer(model, str(tmp_path), trainer=trainer, run=RunRecord([], {}, 9))
    for i in (1, 2, 3):
        torch.nn.init.constant_(model.weight, i)
        trainer.iteration = i
        checkpointer.save(f"model_{i:07d}")
    return tmp_path


def resume(folder):
    model, trainer = torch.nn.Linear(2, 2), _State()
    LongTailCheckpointer(model, str(folder), trainer=trainer).resume_or_load("", resume=True)
    assert (model.weight == trainer.iteration).all()
    return trainer.iteration


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped":  # in the weights, not in the directory of the archive
        at = content.index(torch.full((2, 2), 3.0).numpy().tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut off": content[: len(content) // 2],
                "cut early": content[:300],
                "text": b"not a checkpoint",
            }[how]
        )


@pytest.mark.parametrize("how", ["empty", "cut off", "cut early", "text", "flipped"])
def test_falls_back_to_the_last_good_checkpoint(folder, warnings, how):
    assert resume(folder) == 3 and not warnings()
    damage(folder / "model_0000003.pth", how)
    assert resume(folder) == 2
    said = warnings()
    assert any("model_0000003.pth" in m and ("empty" in m or "cannot be read" in m) for m in said)
    assert any("Resuming from" in m and "model_0000002.pth" in m for m in said)
    assert not any("weights_only=False" in m or "\n" in m for m in said)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ("model_0000009.pth", "names model_0000009.pth"), (None, "is gone")]
)
def test_last_checkpoint_that_names_nothing(folder, warnings, content, message):
    tag = folder / "last_checkpoint"
    if content is None:
        tag.unlink()
    else:
        tag.write_text(content)
    assert resume(folder) == 3
    assert any("last_checkpoint" in m and message in m for m in warnings())


def test_no_checkpoint_can_be_read(folder):
    for file in folder.glob("*.pth"):
        damage(file, "cut off")
    with pytest.raises(UnreadableCheckpoint, match=f"no checkpoint in {folder} can be read .*model_0000001.pth"):
        resume(folder)
    for file in folder.glob("*.pth"):
        file.unlink()
    with pytest.raises(UnreadableCheckpoint, match="there is none; last_checkpoint names model_0000003.pth"):
        resume(folder)


def test_full_disk_leaves_the_old_checkpoint(folder, monkeypatch):
    def full(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"model_0000003.pth could not be written \(.*No space left.*--resume"):
        LongTailCheckpointer(torch.nn.Linear(2, 2), str(folder)).save("model_0000003")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_evaluating_without_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        LongTailCheckpointer(torch.nn.Linear(2, 2), strict=True).load("")
    LongTailCheckpointer(torch.nn.Linear(2, 2)).load("")  # training from scratch


def test_download_without_network(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(PathManager, "get_local_path", offline)
    checkpointer = LongTailCheckpointer(torch.nn.Linear(2, 2), weights_key="train.init_checkpoint")
    for _ in range(2):  # a failed load leaves the checkpointer usable
        with pytest.raises(ConnectionError, match="train.init_checkpoint is https://nowhere/a.pkl.*Name or service"):
            checkpointer.load("https://nowhere/a.pkl")


# ---- pickles


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_arrays_load_and_code_does_not_run(tmp_path, protocol):
    weights = {"weight": np.arange(4, dtype=np.float32).reshape(2, 2), "bias": np.float32([1, 2])}
    file = tmp_path / "weights.pkl"
    model = torch.nn.Linear(2, 2)
    for more in ({"step": np.int64(3), "names": {"a", "b"}}, {"matching_heuristics": True}):
        content = {"model": weights, "__author__": "x", **more}
        file.write_bytes(pickle.dumps(content, protocol=protocol))
        LongTailCheckpointer(model, strict=True).load(str(file))
        assert torch.equal(model.weight, torch.arange(4.0).reshape(2, 2))
    file.write_bytes(pickle.dumps({"model": {"weight": _Evil()}, "__author__": "x"}, protocol=protocol))
    with pytest.raises(UnreadableCheckpoint, match=r"weights.pkl cannot be read.*which is not data and was not run"):
        LongTailCheckpointer(model).load(str(file))
    file.write_bytes(b"\x80")
    with pytest.raises(UnreadableCheckpoint, match="weights.pkl cannot be read"):
        LongTailCheckpointer(model).load(str(file))


def test_imagenet_weights_read_as_detectron2_reads_them(shared_dir):
    path = str(shared_dir / "weights/R-50-imagenet.pkl")
    mine, theirs = (c(torch.nn.Linear(2, 2))._load_file(path) for c in (LongTailCheckpointer, DetectionCheckpointer))
    assert mine.keys() == theirs.keys() and mine["model"].keys() == theirs["model"].keys() and len(mine["model"]) > 200
    for name, value in theirs["model"].items():
        np.testing.assert_array_equal(mine["model"][name], value)


# ---- what differs between a run and its resumption

CONFIG = {
    "SEED": "1", "SOLVER.IMS_PER_BATCH": "2", "SOLVER.MAX_ITER": "5", "SOLVER.BASE_LR": "0.02", "DECOUPLE.ENABLED":
    "False",
    "SOLVER.LR_SCHEDULER_NAME": "'WarmupMultiStepLR'", "DECOUPLE.MAX_ITER": "4", "DECOUPLE.BASE_LR": "0.1",
    "OUTPUT_DIR": "'a'",
    "TEST.EVAL_PERIOD": "0", "MODEL.RPN.POST_NMS_TOPK_TEST": "50", "MODEL.LONG_TAIL.LOSS": "'Softmax'",
    "INPUT.MIN_SIZE_TEST": "8", "FLOAT32_PRECISION": "''",
}  # fmt: skip


def compare(changes, *, stage=1, iteration=2, total=9):
    state = RunRecord([], CONFIG, 9).state_dict()
    record = RunRecord([], {**CONFIG, **changes}, total)
    record.check(state, source="out/model.pth", iteration=iteration, stage=stage)


@pytest.mark.parametrize("key", ["SEED", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "MODEL.LONG_TAIL.LOSS"])
def test_another_run_is_refused(key):
    with pytest.raises(ValueError, match=rf"out/model.pth cannot be resumed.*{key} \({CONFIG[key]}, now 77\)"):
        compare({key: "77"})


def test_changes_ahead_are_named(warnings):
    compare(
        {"OUTPUT_DIR": "'b'", "TEST.EVAL_PERIOD": "3", "MODEL.RPN.POST_NMS_TOPK_TEST": "9", "INPUT.MIN_SIZE_TEST": "9"}
    )
    assert not warnings()
    for key in ("num_workers", "prefetch_factor", "pin_memory"):
        compare({f"dataloader.train.{key}": "4"})
    assert not warnings()
    compare(
        {"SOLVER.MAX_ITER": "7", "DECOUPLE.ENABLED": "True", "DECOUPLE.BASE_LR": "0.2", "FLOAT32_PRECISION": "'high'"}
    )
    (said,) = warnings()
    assert all(
        part in said
        for part in (
            "SOLVER.MAX_ITER (5, now 7)",
            "DECOUPLE.ENABLED (False, now True)",
            "DECOUPLE.BASE_LR",
            "FLOAT32_PRECISION",
        )
    )
    with pytest.raises(ValueError, match="DECOUPLE.BASE_LR"):  # stage 2 has gone by it already
        compare({"DECOUPLE.BASE_LR": "0.2", "DECOUPLE.MAX_ITER": "8"}, stage=2)
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER"):  # and so has a cosine
        compare({"SOLVER.MAX_ITER": "7", "SOLVER.LR_SCHEDULER_NAME": "'WarmupCosineLR'"})


def test_fewer_iterations_than_done():
    compare({}, iteration=8)  # a finished run may be resumed to be evaluated again
    with pytest.raises(ValueError, match="has done 7 iterations and the config ends after 5"):
        compare({}, iteration=6, total=5)


# ---- the whole way


@pytest.fixture
def run(tiny_options, repo_dir):
    """``run("--resume", "KEY", value, ...)``: what tools/train_net.py does, for three iterations of stage 1."""

    def call(*args, tool=main):
        config = ["--config-file", str(repo_dir / "configs/glyph_softmax.yaml")]
        options = [*tiny_options, "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "SOLVER.CHECKPOINT_PERIOD", "1"]
        return tool(argument_parser().parse_args([*config, *options, *map(str, args)]))

    return call


def changed_copy(tiny_paths, folder, name, change):
    """A copy of the val split, its content changed, as a data set."""
    content = json.loads(Path(tiny_paths["val"].json_file).read_text())
    change(content)
    (folder / f"{name}.json").write_text(json.dumps(content))
    register_dataset(name, folder / f"{name}.json", tiny_paths["val"].image_root)
    return name


def test_run_from_the_command_line(run, tiny_paths, tmp_path):
    out = tmp_path / "out"
    run()
    kept = torch.load(out / "model_final.pth")["run"]
    assert kept["thing_classes"] == MetadataCatalog.get("tiny_train").thing_classes and len(kept["thing_classes"]) == 4
    assert kept["data"] == {"tiny_train": os.path.getsize(tiny_paths["train"].json_file)}

    # A second run in the same folder.
    with pytest.raises(FileExistsError, match="holds a run already.*--resume.*--overwrite"):
        run()
    with pytest.raises(FileExistsError, match="--overwrite would delete"):
        run("--overwrite", "MODEL.WEIGHTS", out / "model_final.pth")

    # Another run.
    for changes, message in (
        (("SEED", 7), r"SEED \(1, now 7\)"),
        (("SOLVER.IMS_PER_BATCH", 4), "SOLVER.IMS_PER_BATCH"),
        (("DATASETS.TRAIN", "('tiny_val',)"), "DATASETS.TRAIN"),
        (("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)"), "has done 3 iterations and the config ends after 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run("--resume", *changes)

    # The last checkpoint is cut off: the run goes on from the one before, to the same end.
    whole = torch.load(out / "model_final.pth")["model"]
    for name in ("model_final.pth", "model_0000002.pth"):
        damage(out / name, "cut off")
    run("--resume")
    again = torch.load(out / "model_final.pth")["model"]
    assert all(torch.equal(again[k], v) for k, v in whole.items())
    log = (out / "log.txt").read_text()
    assert "model_final.pth cannot be read" in log and "model_0000001.pth instead" in log

    # Evaluation.
    weights = (
        "--eval-only",
        "MODEL.WEIGHTS",
        out / "model_final.pth",
        "OUTPUT_DIR",
        tmp_path / "eval",
        "DATASETS.TEST",
    )
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        run("--eval-only", "DATASETS.TEST", "('tiny_val',)", "OUTPUT_DIR", tmp_path / "eval")
    assert run(*weights, "('tiny_val',)")["bbox"]

    def shifted(content):
        names = [c["name"] for c in content["categories"]]
        for category, name in zip(content["categories"], names[1:] + names[:1]):
            category["name"] = name

    def fewer(content):
        gone = content["categories"].pop()["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != gone]
        for image in content["images"]:
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                image[key] = [c for c in image.get(key, ()) if c != gone]

    for name, change, message in (
        ("shifted", shifted, "'shifted' has other classes than .*model_final.pth: 4 and not 4, class 0 is"),
        ("fewer", fewer, "'fewer' has other classes than .*model_final.pth: 3 and not 4"),
    ):
        changed_copy(tiny_paths, tmp_path, name, change)
        with pytest.raises(ValueError, match=message):
            run(*weights, f"('{name}',)")
    # And before training, not after it.
    with pytest.raises(ValueError, match=r"'shifted' has other classes than DATASETS.TRAIN 'tiny_train'"):
        run("DATASETS.TEST", "('shifted',)", "OUTPUT_DIR", tmp_path / "other", tool=setup)

    # Weights of other programs know no classes: those of the training set stand in.
    with pytest.raises(ValueError, match="'shifted' has other classes than the training set"):
        check_test_classes({}, "a.pth", ["shifted"], ["tiny_train"])
    check_test_classes({}, "a.pth", ["tiny_val"], ["tiny_train"])


def test_overwrite(folder):
    for name in ("metrics.json", "config.yaml", "events.out.tfevents.1", "mine.txt"):
        (folder / name).write_text("old")
    args = argparse.Namespace(resume=False, overwrite=True)
    prepare_output(str(folder), args)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"] and not checkpoint_files(str(folder))
    prepare_output(str(folder), argparse.Namespace(resume=False, overwrite=False))
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        prepare_output(str(folder), args)


def test_flags_after_the_pairs():
    args = argument_parser().parse_args(
        ["--config-file", "a.yaml", "SOLVER.MAX_ITER", "5", "--resume", "SEED", "1", "--eval-only"]
    )
    assert args.resume and args.eval_only and not args.overwrite
    assert args.opts == ["SOLVER.MAX_ITER", "5", "SEED", "1"] and args.config_file == "a.yaml"


def test_lazy_config_without_weights(repo_dir, tmp_path):
    config = str(repo_dir / "configs/lazy/cascade_mask_rcnn_R_50_FPN_lvis.py")
    overrides = ["train.init_checkpoint=", f"train.output_dir={tmp_path}", "model.backbone.bottom_up.stages.depth=50"]
    with pytest.raises(ValueError, match="train.init_checkpoint is empty"):
        main_lazy(argument_parser().parse_args(["--config-file", config, "--eval-only", *overrides]))
