"""``kill -9`` of a BALMS run of tools/train_net.py, again and again, and ``--resume``: as if nothing had happened."""

import io
import json
import multiprocessing
import os
import runpy
import signal
import sys

import detectron2.engine.defaults
import pytest
import torch
from detectron2.engine import HookBase
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lt_det.data import register_dataset
from lt_det.engine import LongTailTrainer

ITERATIONS, STAGE_2 = 11, 5
# Checkpoints follow the iterations 1, 3, 5, 7 and 9, and the end of stage 1.
KILLS = {
    "in stage 1": ("update", 3),
    "in stage 2": ("update", 7),
    "while a checkpoint is written": ("checkpoint", 9),
}
EXPECTED = [(0, 2), (2, 6), (6, 8), (8, 10)]  # first and last whole iteration of each run


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Probe(HookBase):
    """Writes what every iteration gave as a line of json, and kills its process where it is told to.

    "update": between the gradients and the first update of an iteration (of rates, where it has any, else of
    weights). "checkpoint": when half of the file is written.
    """

    def __init__(self, path: str, kill: tuple | None):
        self._path, self._kill = path, kill

    def before_step(self):
        if self._kill == ("update", self.trainer.iter):
            register_optimizer_step_pre_hook(_die)
        if self._kill == ("checkpoint", self.trainer.iter):
            torch.save = self._half

    @staticmethod
    def _half(data, file, save=torch.save):
        whole = io.BytesIO()
        save(data, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        _die()

    def after_step(self):
        trainer = self.trainer
        latest = trainer.storage.latest()
        seen = {n: v for n, (v, i) in latest.items() if (n == "lr" or "loss" in n) and i == trainer.iter}
        if trainer.meta is not None:
            seen["rates"] = trainer.meta.learner.rates.tolist()
        with open(self._path, "a") as f:
            f.write(json.dumps([trainer.iter, seen]) + "\n")


def _run(tool, arguments, paths, log, record, kill):
    """In a process of its own: the tool, with a probe among the trainer's hooks."""
    multiprocessing.set_start_method("fork", force=True)  # the command line's; this process has got its parent's
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    register_dataset("tiny_train", *paths)
    detectron2.engine.defaults.collect_env_info = str  # asks pip, for seconds
    build_hooks = LongTailTrainer.build_hooks
    LongTailTrainer.build_hooks = lambda self: [*build_hooks(self), Probe(record, kill)]
    sys.argv = [tool, *arguments]
    runpy.run_path(tool, run_name="__main__")


@pytest.mark.parametrize(
    "meta",
    [
        ("META.NAME", "MetaReweighter"),
        ("META.NAME", "MetaSampler", "DECOUPLE.SAMPLER_TRAIN", "MetaSampler", "DATALOADER.NUM_WORKERS", "1"),
    ],
    ids=["reweighter", "image_sampler"],
)
def test_killed_and_resumed_equals_uninterrupted(server, tiny_options, tiny_paths, repo_dir, tmp_path, meta):
    paths = (str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root))

    def run(name, output, kill=None, resume=False):
        """Runs the tool; returns {iteration: what it gave} in the order of time."""
        options = [
            *tiny_options, "OUTPUT_DIR", str(tmp_path / output), "SOLVER.CHECKPOINT_PERIOD", "2",
            "DECOUPLE.MAX_ITER", str(ITERATIONS - STAGE_2), "META.LR", "0.1", *meta,
        ]  # fmt: skip
        arguments = [
            "--config-file",
            str(repo_dir / "configs/glyph_balms.yaml"),
            *(["--resume"] if resume else []),
            *options,
        ]
        log, record = tmp_path / f"{name}.log", tmp_path / f"{name}.jsonl"
        process = server.Process(
            target=_run,
            args=(str(repo_dir / "tools/train_net.py"), arguments, paths, str(log), str(record), kill),
        )
        process.start()
        process.join(timeout=120)
        assert process.exitcode == (-signal.SIGKILL if kill else 0), log.read_text()[-3000:]
        return dict(json.loads(line) for line in record.read_text().splitlines())

    whole = run("whole", "whole")
    assert list(whole) == list(range(ITERATIONS))
    assert max(whole[ITERATIONS - 1]["rates"]) - min(whole[ITERATIONS - 1]["rates"]) > 1e-3

    out = tmp_path / "killed"
    runs = [run(name, "killed", kill, resume=i > 0) for i, (name, kill) in enumerate(KILLS.items())]
    (half,) = out.glob(".model_0000009.pth*")
    assert not (out / "model_0000009.pth").exists() and half.stat().st_size > 0
    runs.append(run("to the end", "killed", resume=True))
    assert [(min(r), max(r)) for r in runs] == EXPECTED
    for seen in runs:
        assert {i: whole[i] for i in seen} == seen  # losses, learning rates and class rates, to the last bit

    finals = [torch.load(tmp_path / o / "model_final.pth") for o in ("whole", "killed")]
    for part in ("model", "trainer"):
        _assert_equal(*(f[part] for f in finals))
    assert not list(out.glob(".model*"))  # the next save of that name took the torn file's place


def _assert_equal(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            _assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), where
