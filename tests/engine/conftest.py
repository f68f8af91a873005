"""Runs of a tiny detector on the tiny data set, in seconds."""

import pytest
from recorded_run import run_trainer

from lt_det.data import register_dataset
from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg


@pytest.fixture
def tiny_options(tiny_paths, tiny_model_options, tmp_path):
    """Command-line KEY VALUE pairs of a two-stage run of 5 + 4 iterations on the tiny data set."""
    for split, paths in tiny_paths.items():
        register_dataset(f"tiny_{split}", paths.json_file, paths.image_root)
    return [
        *tiny_model_options, "OUTPUT_DIR", str(tmp_path / "out"),
        "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "()",
        "INPUT.MIN_SIZE_TRAIN", "(56,64,72)", "INPUT.MAX_SIZE_TRAIN", "80",
        "SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "(4,)", "SOLVER.WARMUP_ITERS", "2",
        "SOLVER.CHECKPOINT_PERIOD", "100", "DECOUPLE.MAX_ITER", "4", "DECOUPLE.STEPS", "(3,)",
        "DECOUPLE.WARMUP_ITERS", "1",
    ]  # fmt: skip


@pytest.fixture
def tiny_cfg(tiny_options, repo_dir):
    """``tiny_cfg("KEY", value, ...)``: the finished config, with changes."""

    def build(*changes):
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(str(repo_dir / "configs/glyph_balanced_softmax.yaml"))
        cfg.merge_from_list(tiny_options)
        cfg.merge_from_list(list(changes))
        return finish_config(cfg)

    return build


@pytest.fixture
def train():
    """Run a yaml config, see :func:`run_trainer`."""
    return lambda cfg, **how: run_trainer(lambda: LongTailTrainer(cfg), **how)


@pytest.fixture
def interrupt_and_compare(train, tmp_path):
    """Run a config that dies after an iteration, resume it, and run it whole: the losses must be the same.

    Returns the trainer and the record of the resumed run, and those of the whole one.
    """

    def run(build_cfg, *options, stop_after):
        options = (*options, "SOLVER.CHECKPOINT_PERIOD", 1)
        cfg = build_cfg(*options)
        train(cfg, stop_after=stop_after)
        resumed, tail = train(cfg, resume=True)
        whole, record = train(build_cfg(*options, "OUTPUT_DIR", str(tmp_path / "whole")))
        assert sorted(tail.losses) == list(range(stop_after + 1, whole.max_iter))
        for iteration in tail.losses:
            assert tail.losses[iteration] == record.losses[iteration], iteration
            assert tail.lr[iteration] == record.lr[iteration]
        return resumed, tail, whole, record

    return run
