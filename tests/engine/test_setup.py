"""Command line, configs, and the errors a user meets."""

import argparse
import logging
import multiprocessing
import os
import platform

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer

from lt_det.engine import LongTailCheckpointer, LongTailTrainer, argument_parser, finish_config, get_lt_det_cfg, setup
from lt_det.engine.setup import begin_run, run
from lt_det.losses import LOSS_REGISTRY
from lt_det.processes import usable_cores


def arguments(*args) -> argparse.Namespace:
    return argument_parser().parse_args([*map(str, args)])


def test_every_config_loads(repo_dir):
    files = sorted((repo_dir / "configs").glob("*.yaml"))
    assert files
    for file in files:
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(str(file))
        finish_config(cfg)
        if not file.name.startswith("Base-"):
            assert cfg.MODEL.LONG_TAIL.LOSS in LOSS_REGISTRY and cfg.DECOUPLE.LOSS in LOSS_REGISTRY
            assert file.stem in cfg.OUTPUT_DIR


def test_more_loaders_than_processors_are_named_once(caplog):
    cfg = get_lt_det_cfg()
    cfg.DATALOADER.NUM_WORKERS = 10_000
    with caplog.at_level("WARNING", "lt_det"):
        finish_config(cfg)
    (message,) = [r.getMessage() for r in caplog.records if "NUM_WORKERS" in r.getMessage()]
    assert message == f"DATALOADER.NUM_WORKERS is 10000, the machine has {usable_cores()} processors"


def test_lvis_recipe(repo_dir):
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(repo_dir / "configs/lvis_balms.yaml"))
    assert cfg.DATASETS.TRAIN == ("lvis_v1_train",) and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1203
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and cfg.DATALOADER.REPEAT_THRESHOLD == 0.001
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300 and cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 1e-4
    assert cfg.DECOUPLE.ENABLED and cfg.DECOUPLE.MAX_ITER == 38800 and cfg.DECOUPLE.STEPS == (19400, 31800)


def test_config_mirrors_the_losses():
    """Every option of every loss is a config key with the same default, and every such key is an option."""
    lt = get_lt_det_cfg().MODEL.LONG_TAIL
    for name, loss in LOSS_REGISTRY:
        wanted = {key.upper(): list(v) if isinstance(v, tuple) else v for key, v in loss.options().items()}
        node = lt.get(loss.config_node, {})
        assert {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in node.items()} == wanted, name
    nodes = {loss.config_node for _, loss in LOSS_REGISTRY}
    known = {key for key, value in lt.items() if isinstance(value, dict)} - {"CLASSIFIER", "CALIBRATOR"}
    assert known <= nodes


def test_missing_files_are_named(repo_dir, tiny_options, tmp_path):
    config = repo_dir / "configs/glyph_balms.yaml"
    with pytest.raises(FileNotFoundError, match="no such file"):
        setup(arguments("--config-file", tmp_path / "absent.yaml"))
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS"):
        setup(arguments("--config-file", config, *tiny_options, "MODEL.WEIGHTS", tmp_path / "absent.pth"))
    with pytest.raises(KeyError, match="DATASETS.REGISTER"):
        setup(arguments("--config-file", config, *tiny_options, "DATASETS.TRAIN", "('tiny_trian',)"))
    entry = f"[('absent', '{tmp_path}/a.json', '{tmp_path}')]"
    with pytest.raises(FileNotFoundError, match="a.json"):
        setup(
            arguments(
                "--config-file", config, *tiny_options, "DATASETS.REGISTER", entry, "DATASETS.TRAIN", "('absent',)"
            )
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_means_cpu_without_amp(tiny_cfg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lt_det"), "propagate", True)
    with caplog.at_level(logging.WARNING, "lt_det"):
        cfg = tiny_cfg("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True)
    assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
    assert "MODEL.DEVICE" in caplog.text and "SOLVER.AMP.ENABLED" in caplog.text
    trainer = LongTailTrainer(cfg)._trainer
    assert isinstance(trainer, SimpleTrainer) and not isinstance(trainer, AMPTrainer)


def test_interrupted_save_keeps_the_old_checkpoint(tiny_cfg, tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    checkpointer = LongTailCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()
    save = torch.save

    def half(data, file):
        save({"half": 1}, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"


@pytest.fixture
def with_gpu(monkeypatch):
    """A GPU to look at, and PyTorch's settings put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_float32_precision(precision, repo_dir, tiny_options, with_gpu):
    """Newer Detectron2's key, with any Detectron2."""
    setup(arguments("--config-file", repo_dir / "configs/glyph_balms.yaml", *tiny_options,
                    "FLOAT32_PRECISION", precision, "MODEL.DEVICE", "cpu"))  # fmt: skip
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == (precision == "medium")


def begin_and_allocate(device, faults):
    """In a process of its own: the kernel's pages that 20 blocks of 64 MB take after the first, one at a time."""
    import resource

    begin_run(argparse.Namespace(eval_only=True, config_file=""), "", device=device, seed=-1, cudnn_benchmark=False)
    used = []
    for _ in range(21):
        torch.ones(2**24)
        used.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    faults.send(used[-1] - used[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_runs_on_a_cpu_keep_freed_memory(server):
    pages = {}
    for device in ("cuda", "cpu"):
        mine, its = multiprocessing.Pipe()
        process = server.Process(target=begin_and_allocate, args=(device, its))
        process.start()
        assert mine.poll(120)
        pages[device] = mine.recv()
        process.join()
    # Not none: a small block may take the place of a large one.
    assert pages["cuda"] > 20 and pages["cpu"] < pages["cuda"] / 2


def test_wrong_float32_precision(repo_dir, tiny_options):
    with pytest.raises(ValueError, match="FLOAT32_PRECISION .* is 'hihgest'; it is 'highest', 'high'"):
        setup(arguments("--config-file", repo_dir / "configs/glyph_balms.yaml", *tiny_options,
                        "FLOAT32_PRECISION", "hihgest"))  # fmt: skip


def test_test_time_augmentation(tiny_cfg):
    """``TEST.AUG.ENABLED``: what is trained is evaluated with augmentation too, as Detectron2's train_net does."""
    cfg = tiny_cfg(
        "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.MAX_SIZE", 80, "SOLVER.MAX_ITER", 1,
        "SOLVER.STEPS", (), "DECOUPLE.ENABLED", False, "DATASETS.TEST", ("tiny_val",),
    )  # fmt: skip
    results = run(cfg, argparse.Namespace(eval_only=False, resume=False))
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert results["segm_TTA"].keys() == results["segm"].keys()
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "inference_TTA", "metrics.json"))
