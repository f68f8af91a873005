"""Hooks that choose: the best checkpoint, when to stop, and the loss on validation data that one may choose by."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

__all__ = ["BestCheckpoint", "EarlyStop", "EarlyStopping", "ValidationLoss", "build_validation_loader"]

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Ends a training that does not improve any more. Not an ``Exception``: it is no failure to be logged as one."""


def latest(storage, metric: str, iteration: int) -> float | None:
    """The value of a metric that was put into the storage in this iteration, or None."""
    value, at = storage.latest().get(metric, (None, -1))
    return value if at == iteration else None


class BestCheckpoint(HookBase):
    """Keep the model of the best value of a metric as ``model_best.pth``.

    It goes after the ``EvalHook``, on the main process. Unlike Detectron2's ``BestCheckpointer`` it is in the
    checkpoint, so that a resumed run keeps the best of all, and it passes over an earlier stage.
    """

    def __init__(self, checkpointer, metric: str, *, mode: str = "max", start_iter: int = 0):
        """
        Args:
            checkpointer: has ``save(name, iteration=...)``.
            metric: as evaluation names it, e.g. ``"segm/APr"``, or ``"validation/total_loss"``.
            mode: ``"max"``, or ``"min"`` for losses.
            start_iter: values before this iteration do not count: of an earlier stage, whose model is another.
        """
        self._checkpointer, self._metric, self._start = checkpointer, metric, start_iter
        self._sign = 1.0 if mode == "max" else -1.0
        self.best: float | None = None

    def _look(self) -> None:
        trainer = self.trainer
        value = latest(trainer.storage, self._metric, trainer.iter)
        if value is None or math.isnan(value) or trainer.iter < self._start:
            return
        if self.best is None or self._sign * value > self._sign * self.best:
            self.best = value
            iteration = min(trainer.iter, trainer.max_iter - 1)
            self._checkpointer.save("model_best", iteration=iteration)
            logger.info("model_best.pth: %s is %.4g after iteration %d", self._metric, value, iteration)

    def after_step(self) -> None:
        self._look()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # the last evaluation comes when training is done
            self._look()

    def state_dict(self) -> dict:
        return {} if self.best is None else {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]


class EarlyStopping(HookBase):
    """Stop when a metric has not improved for some evaluations.

    It goes after the ``EvalHook``, on every rank. The main process knows the metric; all stop in the same iteration,
    and the last model is kept as ``model_final.pth``. A resumed run does not know of an evaluation in the very
    iteration of its checkpoint, which was written before.
    """

    def __init__(self, metric: str, patience: int, *, mode: str = "max", start_iter: int = 0):
        """
        Args:
            metric: as for :class:`BestCheckpoint`.
            patience: evaluations in a row that may bring nothing.
            mode: ``"max"`` or ``"min"``.
            start_iter: evaluations before this iteration do not count: of an earlier stage, whose model is another.

        Raises:
            ValueError: for a patience below 1 or another mode.
        """
        if patience < 1 or mode not in ("max", "min"):
            raise ValueError(f"patience must be at least 1 and mode 'max' or 'min', got {patience} and {mode!r}")
        self._metric, self._patience, self._start = metric, patience, start_iter
        self._sign = 1.0 if mode == "max" else -1.0
        self._best = -math.inf
        self._without = 0

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.iter < self._start or trainer.iter + 1 >= trainer.max_iter:
            return
        value = latest(trainer.storage, self._metric, trainer.iter)
        if value is not None:
            if self._sign * value > self._best:  # never for NaN
                self._best, self._without = self._sign * value, 0
            else:
                self._without += 1
        stop = self._without >= self._patience
        if any(comm.all_gather(stop)) if comm.get_world_size() > 1 else stop:
            if comm.is_main_process():
                trainer.checkpointer.save("model_final", iteration=trainer.iter)
            logger.info(
                "Stopped after iteration %d: %s has not improved in %d evaluations (best %.4g)",
                trainer.iter, self._metric, self._patience, self._sign * self._best,
            )  # fmt: skip
            raise EarlyStop

    def state_dict(self) -> dict:
        return {"best": self._best, "without": self._without}

    def load_state_dict(self, state: dict) -> None:
        self._best, self._without = state["best"], state["without"]


@contextmanager
def _as_it_was(model: nn.Module):
    """Undo what a block does to a model's buffers, modes and plain attributes, and to the random generators."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # Numbers and flags that modules keep beside their buffers, the mode among them.
    plain = {
        module: {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (bool, int, float)) or v is None}
        for module in model.modules()
    }
    numpy_state = np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, values in plain.items():
            vars(module).update(values)


class ValidationLoss(HookBase):
    """The training losses on validation data, in the training's metrics as ``validation/<loss>``.

    The model runs as in training (so proposals and RoIs are sampled; always the same), batch normalisation as at
    inference. What losses count while they train is as before when it is done. Each rank sees its share of the images.
    Losses whose form changes while they train (running counts, queues) are computed as they stand.
    """

    def __init__(self, period: int, model: nn.Module | Callable[[], nn.Module], build_loaders: Callable[[], list]):
        """
        Args:
            period: iterations from one validation to the next.
            model: the detector, or what gives it; not wrapped for distributed training.
            build_loaders: makes loaders of batches with ``instances``, see :func:`build_validation_loader`. Called
                once.
        """
        self._period = period
        self._model = model
        self._build = build_loaders
        self._loaders: list[Iterable] | None = None

    def after_step(self) -> None:
        trainer = self.trainer
        if (trainer.iter + 1) % self._period and trainer.iter + 1 < trainer.max_iter:
            return
        for name, value in self.compute().items():
            trainer.storage.put_scalar(f"validation/{name}", value, smoothing_hint=False)

    def compute(self) -> dict[str, float]:
        """Means over images of each loss, and ``total_loss``; the same on every rank."""
        self._loaders = self._build() if self._loaders is None else self._loaders
        model = self._model if isinstance(self._model, nn.Module) else self._model()
        sums: dict[str, float] = {}
        count = 0
        with _as_it_was(model), torch.no_grad(), EventStorage():
            torch.manual_seed(0)
            np.random.seed(0)
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            for batch in chain(*self._loaders):
                for name, value in model(batch).items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
                count += len(batch)
        shares = comm.all_gather((sums, count)) if comm.get_world_size() > 1 else [(sums, count)]
        total = sum(n for _, n in shares)
        names = sorted({name for part, _ in shares for name in part})
        means = {name: sum(part.get(name, 0.0) for part, _ in shares) / max(total, 1) for name in names}
        means["total_loss"] = sum(means.values())
        return means


def build_validation_loader(cfg: CfgNode, dataset: str, images: int = 0) -> Iterable:
    """Batches of a data set with its annotations, at test resolution and without random augmentation.

    Args:
        images: use so many, evenly spread over the set; 0: all.
    """
    records = get_detection_dataset_dicts(dataset, filter_empty=False)
    if 0 < images < len(records):
        records = [records[i] for i in np.linspace(0, len(records) - 1, images).round().astype(int).tolist()]
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")
    mapper = DatasetMapper(
        is_train=True,  # that is: with annotations
        augmentations=[resize],
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
    )
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
