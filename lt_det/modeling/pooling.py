"""RoIAlign that reads all channels of a point together, for evaluation on a CPU."""

from __future__ import annotations

import math

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torchvision.ops import roi_align

__all__ = ["LongTailROIAlign", "pool_by_points"]


class LongTailROIAlign(ROIAlign):
    """Detectron2's ``ROIAlign``; on a CPU, where nothing asks for a gradient, by a kernel of its own.

    torchvision's CPU kernel goes through the map once for each channel. Here the channels of a pixel lie together, so
    that one look at a point serves all. The terms of a sum and their order are torchvision's, and so are the bits
    where its compiler does not contract products and sums (x86-64).
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """``(B, C, H, W)`` maps and ``(R, 5)`` RoIs (index in the batch, x0, y0, x1, y1) to ``(R, C, h, w)``."""
        if not torch.jit.is_scripting():  # whose compiler leaves out this block alone, not half of a condition
            if self._is_evaluated_here(input, rois):
                return self._by_points(input, rois)
        rois = rois.to(dtype=input.dtype)
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def _is_evaluated_here(self, input: Tensor, rois: Tensor) -> bool:
        return (
            type(input) is Tensor
            and input.is_cpu
            and input.dtype in (torch.float32, torch.float64)
            and not (torch.is_grad_enabled() and (input.requires_grad or rois.requires_grad))
            and not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and bool(rois.isfinite().all())
        )

    def _by_points(self, input: Tensor, rois: Tensor) -> Tensor:
        from ._pooling_kernels import roi_align as kernel

        maps = input.detach().permute(0, 2, 3, 1).contiguous().numpy()
        out = input.new_empty((len(rois), input.shape[1], *self.output_size))
        real = maps.dtype.type
        shift, smallest = (0.5, -math.inf) if self.aligned else (0.0, 1.0)
        scale = real(self.spatial_scale)
        rois = rois.detach().to(input.dtype).contiguous()
        kernel(maps, rois.numpy(), scale, self.sampling_ratio, real(shift), real(smallest), out.numpy())
        return out


def pool_by_points(model: nn.Module) -> nn.Module:
    """Put ``LongTailROIAlign`` in the place of every ``ROIAlign`` of the model's poolers.

    Returns:
        the model, so that a LazyConfig can say ``L(pool_by_points)(model=...)``.
    """
    for pooler in [module for module in model.modules() if isinstance(module, ROIPooler)]:
        for level, align in enumerate(pooler.level_poolers):
            if type(align) is ROIAlign:
                how = align.output_size, align.spatial_scale, align.sampling_ratio, align.aligned
                pooler.level_poolers[level] = LongTailROIAlign(*how)
    return model
