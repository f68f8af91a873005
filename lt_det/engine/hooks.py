"""Training hooks."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from lt_det.data import ClassStatistics
from lt_det.meta import plot_rates, rates_by_group, summary_of_rates, write_rates

logger = logging.getLogger(__name__)


class IterationSeed(HookBase):
    """Seed every random generator at the start of each iteration from (seed, iteration, rank).

    What an iteration draws (RoI and anchor sampling, losses that sample) then depends on nothing that happened before
    it, so a run that was interrupted anywhere continues to the same losses.
    """

    def before_step(self) -> None:
        words = (self.trainer.seed, self.trainer.iter, comm.get_rank())
        state = np.random.SeedSequence(words).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))
        torch.manual_seed(int(state[2]))


class StageLRScheduler(HookBase):
    """Step and log the learning rate of whichever stage the trainer is in.

    Detectron2's ``LRScheduler`` keeps the optimizer that it first saw.
    """

    def after_step(self) -> None:
        optimizer = self.trainer.optimizer
        group = hooks.LRScheduler.get_best_param_group_id(optimizer)
        self.trainer.storage.put_scalar("lr", optimizer.param_groups[group]["lr"], smoothing_hint=False)
        self.trainer.scheduler.step()

    def state_dict(self) -> dict:
        return self.trainer.scheduler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.trainer.scheduler.load_state_dict(state)


class PhaseHook(HookBase):
    """Enter the stages and changes of a run when their iteration comes.

    Those that a checkpoint already was in are entered when it is loaded (``Trainer.prepare_to_load``).
    """

    def before_step(self) -> None:
        self.trainer.enter_phases(self.trainer.iter)


class StageCheckpointer(HookBase):
    """Keep the model that a stage starts from."""

    def __init__(self, names: Mapping[int, str]):
        """
        Args:
            names: by iteration, the name of the checkpoint to write after it.
        """
        self._names = names

    def after_step(self) -> None:
        if self.trainer.iter in self._names:
            self.trainer.checkpointer.save(self._names[self.trainer.iter])


class LoaderStateHook(HookBase):
    """Keep the train loader's state of every rank for checkpoints, where its sampler cannot be replayed from a seed.

    Checkpoints are written by one rank alone, so the states are gathered in the iterations that end with one.
    """

    def __init__(self, period: int):
        self._period = period
        self._states: list[dict] = []

    def after_step(self) -> None:
        trainer = self.trainer
        due = trainer.iter + 1 >= trainer.max_iter or (trainer.iter + 1) % self._period == 0
        sampler = getattr(trainer.data_loader, "sampler", None)
        if due and not getattr(sampler, "resumable_by_replay", True):
            self._states = comm.gather(trainer.data_loader.state_dict())

    def state_dict(self) -> dict:
        return {"ranks": self._states} if self._states else {}

    def load_state_dict(self, state: dict) -> None:
        if len(state["ranks"]) != comm.get_world_size():
            raise ValueError(
                f"the run had {len(state['ranks'])} processes and its sampler goes on with as many, not with "
                f"{comm.get_world_size()}; resume with --num-gpus {len(state['ranks'])}"
            )
        self.trainer.loader_state = state["ranks"][comm.get_rank()]


class MetaHook(HookBase):
    """Pass the learned class rates on to an image sampler that follows them, and show them to the user.

    TensorBoard has the mean rate of each frequency group and the histogram over classes; at the end of training the log
    has a line, and the output folder ``meta_rates.csv`` (by class) and ``meta_rates.png`` (rate against image count).
    """

    def __init__(self, output_dir: str, statistics: Callable[[], ClassStatistics] | None, period: int = 20):
        """
        Args:
            statistics: gives the classes' counts, once; None: they are not known, and the histogram is all there is.
            period: iterations from one point in TensorBoard to the next.
        """
        self._output_dir, self._read, self._period = output_dir, statistics, period

    @cached_property
    def _statistics(self) -> ClassStatistics | None:
        return None if self._read is None else self._read()

    def after_step(self) -> None:
        trainer, meta = self.trainer, self.trainer.meta
        if meta is None:
            return
        if meta.applied:
            loader = trainer.data_loader
            loader.sampler.follow(meta.learner.rates.cpu().numpy(), loader.iteration)
        if comm.is_main_process() and ((trainer.iter + 1) % self._period == 0 or trainer.iter + 1 == trainer.max_iter):
            rates = meta.learner.rates.cpu()
            if self._statistics is not None:
                for group, rate in rates_by_group(rates, self._statistics).items():
                    trainer.storage.put_scalar(f"meta/rate_{group}", rate, smoothing_hint=False)
            trainer.storage.put_histogram("meta/rates", rates, bins=50)

    def after_train(self) -> None:
        meta = self.trainer.meta
        if meta is None or not comm.is_main_process() or self._statistics is None:
            return
        rates = meta.learner.rates.cpu()
        logger.info("%s: %s", type(meta.learner).__name__, summary_of_rates(rates, self._statistics))
        write_rates(rates, self._statistics, os.path.join(self._output_dir, "meta_rates.csv"))
        picture = plot_rates(rates, self._statistics, os.path.join(self._output_dir, "meta_rates.png"))
        self.trainer.storage.put_image("meta/rates", picture)
