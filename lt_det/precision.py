"""Mixed precision on whatever device a run is on."""

from __future__ import annotations

import torch

__all__ = ["autocast"]


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision: float16 on GPUs, as in Detectron2, bfloat16 on CPUs.

    bfloat16 has the range of float32, so that gradients need no scaling.
    """
    on_gpu = device.type == "cuda"
    return torch.autocast(device.type, torch.float16 if on_gpu else torch.bfloat16, enabled=enabled)
