"""A training whose losses and rates are kept, and that may die after an iteration."""

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm


class Interrupted(Exception):
    pass


class Record(HookBase):
    """Keeps each iteration's losses and learning rate; stops the run after an iteration."""

    def __init__(self, stop_after: int | None = None):
        self.losses, self.lr, self._stop = {}, {}, stop_after

    def after_step(self):
        storage = self.trainer.storage
        names = [name for name in storage.histories() if "loss" in name]
        latest = {name: storage.latest()[name] for name in names}
        self.losses[self.trainer.iter] = {n: value for n, (value, i) in latest.items() if i == self.trainer.iter}
        self.lr[self.trainer.iter] = storage.latest()["lr"][0]
        if self.trainer.iter == self._stop:
            raise Interrupted


def run_trainer(build, *, resume=False, stop_after=None):
    """Train what ``build`` makes; returns the trainer and the record. ``stop_after``: die after that iteration."""
    torch.manual_seed(0)
    trainer = build()
    trainer.resume_or_load(resume=resume)
    record = Record(stop_after)
    trainer.register_hooks([record])
    try:
        trainer.train()
    except Interrupted:
        pass
    assert comm.get_world_size() == 1
    return trainer, record
