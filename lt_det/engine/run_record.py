"""What a checkpoint knows of its run, so that nobody evaluates it on other classes or resumes it as another run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from .checks import flat, model_classes
from .checks_lazy import lazy_datasets

logger = logging.getLogger(__name__)

# Keys that may change whenever a run is resumed, without a word.
_FREE = (
    "OUTPUT_DIR VERSION VIS_PERIOD TEST DATASETS.TEST DATASETS.REGISTER DATASETS.PROPOSAL_FILES_TEST "
    "DATALOADER.NUM_WORKERS SOLVER.CHECKPOINT_PERIOD SOLVER.REFERENCE_WORLD_SIZE MODEL.WEIGHTS MODEL.DEVICE "
    "MODEL.LONG_TAIL.CALIBRATOR MODEL.LONG_TAIL.STATISTICS DECOUPLE.EVAL_STAGE1 DECOUPLE.FEATURE_CACHE.DIR "
    "TEACHER.EVAL CUDNN_BENCHMARK train.output_dir train.init_checkpoint train.device train.eval_period "
    "train.log_period train.checkpointer train.cudnn_benchmark train.ddp dataloader.test dataloader.evaluator "
    "dataloader.train.num_workers dataloader.train.prefetch_factor dataloader.train.pin_memory "
    "dataloader.train.dataset_dicts"
).split()
# Keys that bear on iterations to come, where their phase has not begun: named, and the run goes on.
_AHEAD = (
    "SOLVER.MAX_ITER SOLVER.STEPS SOLVER.AMP DRW TEACHER FLOAT32_PRECISION train.max_iter train.drw train.teacher "
    "train.amp train.float32_precision lr_multiplier"
).split()
_STAGE2 = ("DECOUPLE", "META", "train.decouple")
_STAGE2_AHEAD = ("DECOUPLE.MAX_ITER", "DECOUPLE.STEPS")


def _under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _for_tests_only(key: str) -> bool:
    return key.endswith("_TEST") or ".test_" in key


class RunRecord:
    """The field ``run`` of a checkpoint: a dict of ``thing_classes`` (names, or None), ``data`` (bytes of the
    annotation file by data set), ``config`` (values as text by key) and ``processes`` (their number).

    One of the checkpointer's ``checkpointables``; :class:`~lt_det.engine.LongTailCheckpointer` calls :meth:`check`
    before it loads anything of a checkpoint that a run is to go on from.
    """

    def __init__(self, datasets: Iterable[str], config: Mapping[str, str], total_iterations: int):
        """
        Args:
            datasets: names of the training sets.
            config: the run's keys, flat, and their values as text.
            total_iterations: length of the run.
        """
        self._datasets = list(datasets)
        self._config = dict(config)
        self._total_iterations = total_iterations

    @classmethod
    def from_config(cls, cfg: CfgNode, total_iterations: int) -> RunRecord:
        return cls(cfg.DATASETS.TRAIN, {key: repr(value) for key, value in flat(cfg)}, total_iterations)

    @classmethod
    def from_lazy(cls, cfg: DictConfig) -> RunRecord:
        config = {key: value for key, value in flat_lazy(cfg) if " at 0x" not in value}
        return cls(lazy_datasets(cfg, "train"), config, cfg.train.max_iter)

    @cached_property
    def thing_classes(self) -> list[str] | None:
        """Names of the classes that the model learns, in their order; None where the data sets name none."""
        return model_classes(self._datasets)

    def state_dict(self) -> dict:
        return {
            "thing_classes": self.thing_classes,
            "data": {name: _size(name) for name in self._datasets},
            "config": self._config,
            "processes": comm.get_world_size(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: what the checkpoint says was compared before."""

    def check(self, state: Mapping[str, Any], *, source: str, iteration: int, stage: int) -> None:
        """Compare with the run that a checkpoint was saved in; log what differs.

        Args:
            state: what its :meth:`state_dict` gave.
            source: the checkpoint, for messages.
            iteration: the last one that was done. stage: in which.

        Raises:
            ValueError: if going on would not be the same run.
        """
        total = self._total_iterations
        if iteration + 1 > total:
            raise ValueError(
                f"{source} has done {iteration + 1} iterations and the config ends after {total}; raise "
                "SOLVER.MAX_ITER (DECOUPLE.MAX_ITER, train.max_iter), or evaluate it by --eval-only"
            )
        mine, theirs = self.state_dict(), dict(state)
        refused = []
        if theirs["thing_classes"] and mine["thing_classes"] and theirs["thing_classes"] != mine["thing_classes"]:
            refused.append("the classes of the training set")
        for name, size in mine["data"].items():
            before = theirs["data"].get(name)
            if size is not None and before is not None and size != before:
                refused.append(f"the annotations of {name} ({before:,} bytes, now {size:,})")
        named = []
        for key, value in self._config.items():
            before = theirs["config"].get(key, value)
            if value == before or _under(key, _FREE) or _for_tests_only(key):
                continue
            text = f"{key} ({_short(before)}, now {_short(value)})"
            (named if self._is_ahead(key, stage) else refused).append(text)
        if refused:
            raise ValueError(
                f"{source} cannot be resumed as the same run, since these differ: {'; '.join(refused)}. Resume with "
                "the run's own values (config.yaml beside it), or begin a new run from its weights: without "
                "--resume, with MODEL.WEIGHTS (train.init_checkpoint) set to it and another OUTPUT_DIR"
            )
        if named:
            logger.warning("Resumed with changes that bear on what is still to come: %s", "; ".join(named))
        if theirs["processes"] != mine["processes"]:
            logger.warning(
                "Resumed with %d processes instead of %d: the same images, but sums in another order",
                mine["processes"], theirs["processes"],
            )  # fmt: skip

    def _is_ahead(self, key: str, stage: int) -> bool:
        if key == "SOLVER.MAX_ITER" and "Cosine" in self._config.get("SOLVER.LR_SCHEDULER_NAME", ""):
            return False  # the schedule so far went by it
        if _under(key, _STAGE2):
            return stage < 2 or _under(key, _STAGE2_AHEAD)
        return _under(key, _AHEAD)


def _size(dataset: str) -> int | None:
    path = MetadataCatalog.get(dataset).get("json_file")
    return os.path.getsize(path) if path and os.path.isfile(path) else None


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def flat_lazy(cfg: DictConfig) -> Iterable[tuple[str, str]]:
    """Keys of a LazyConfig, with dots, and their values as text; what has no text of its own says where it lies."""
    content = OmegaConf.to_container(cfg, resolve=False)

    def visit(node, path):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from visit(value, f"{path}.{key}" if path else str(key))
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                yield from visit(value, f"{path}.{i}")
        elif callable(node):
            yield path, f"{getattr(node, '__module__', '')}.{getattr(node, '__qualname__', type(node).__name__)}"
        else:
            yield path, repr(node)

    return visit(content, "")
