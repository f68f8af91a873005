"""A training step in mixed precision on CPUs, which Detectron2 does not have."""

from __future__ import annotations

import time

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from lt_det.precision import autocast

__all__ = ["BFloat16Trainer"]


class BFloat16Trainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with its forward pass under bfloat16 autocast.

    Convolutions get their fastest layout, channels last; weights, optimizer and losses stay in float32.
    """

    def __init__(self, model: nn.Module, data_loader, optimizer: torch.optim.Optimizer):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it alone
        super().__init__(model, data_loader, optimizer)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with autocast(torch.device("cpu"), True):
            loss_dict = self.model(data)
        losses = sum(loss_dict.values())
        self.optimizer.zero_grad()
        losses.backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.optimizer.step()
