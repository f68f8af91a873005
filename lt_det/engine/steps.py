"""A training step in mixed precision on CPUs, which Detectron2 does not have."""

from __future__ import annotations

import time

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from lt_det.precision import autocast

__all__ = ["BFloat16Trainer", "in_channels_last"]


def in_channels_last(module: nn.Module) -> None:
    """Give convolutions the layout in which bfloat16 is fastest. For DDP, before it wraps the module: it keeps it."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it alone


class BFloat16Trainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with its forward pass under bfloat16 autocast. Weights, optimizer and losses stay
    in float32."""

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
