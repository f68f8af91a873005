"""Gradient clipping by Detectron2's keys, also where parameters have no gradient.

Detectron2 clips each parameter by itself, and current torch raises for one without a gradient: a frozen one, or a part
of the model that the batch did not reach.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch.nn.utils import clip_grad_norm_, clip_grad_value_


def clip_gradients(optimizer: torch.optim.Optimizer, cfg: CfgNode) -> None:
    """Make ``optimizer.step`` clip first, parameter by parameter, by ``SOLVER.CLIP_GRADIENTS`` (the node given).

    With automatic mixed precision this comes after the gradients are unscaled, as it must.

    Raises:
        ValueError: for an unknown ``CLIP_TYPE``.
    """
    clippers = {
        "value": lambda p: clip_grad_value_(p, cfg.CLIP_VALUE),
        "norm": lambda p: clip_grad_norm_(p, cfg.CLIP_VALUE, cfg.NORM_TYPE),
    }
    if cfg.CLIP_TYPE not in clippers:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {cfg.CLIP_TYPE!r}; it must be one of {sorted(clippers)}")
    clip = clippers[cfg.CLIP_TYPE]

    def before_step(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    clip(parameter)

    optimizer.register_step_pre_hook(before_step)
