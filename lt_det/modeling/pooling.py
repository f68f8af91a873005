"""RoIAlign that reads and writes all channels of a point together, on a CPU."""

from __future__ import annotations

import math

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

__all__ = ["LongTailROIAlign", "pool_by_points"]


class LongTailROIAlign(ROIAlign):
    """Detectron2's ``ROIAlign``; on a CPU by kernels of its own, forward and backward.

    torchvision's CPU kernels go through the map once for each channel. Here the channels of a pixel lie together, so
    that one look at a point serves all. The terms of a sum and their order are torchvision's, and so are the bits
    where its compiler does not contract products and sums (x86-64). bfloat16, autocast's, is computed in float32 as
    autocast does.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """``(B, C, H, W)`` maps and ``(R, 5)`` RoIs (index in the batch, x0, y0, x1, y1) to ``(R, C, h, w)``."""
        if not torch.jit.is_scripting():  # whose compiler leaves out this block alone, not half of a condition
            if self._is_computed_here(input, rois):
                real = torch.float64 if input.dtype == torch.float64 else torch.float32
                boxes = rois.to(input.dtype).to(real)  # Detectron2 rounds them to the type of the map
                return _PoolByPoints.apply(input.to(real), boxes, self).to(input.dtype)
        rois = rois.to(dtype=input.dtype)
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def _is_computed_here(self, input: Tensor, rois: Tensor) -> bool:
        return (
            type(input) is Tensor
            and input.is_cpu
            and input.dtype in (torch.float32, torch.float64, torch.bfloat16)
            and not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and bool(rois.isfinite().all())
        )

    def _sampling(self, real: type) -> tuple:
        """The kernels' arguments that do not depend on the data, in a numpy type."""
        shift, smallest = (0.5, -math.inf) if self.aligned else (0.0, 1.0)
        return real(self.spatial_scale), self.sampling_ratio, real(shift), real(smallest)


class _PoolByPoints(torch.autograd.Function):
    """The gradient is that of the maps; as in torchvision, boxes get none, and there is no second derivative."""

    @staticmethod
    def forward(ctx, maps: Tensor, rois: Tensor, align: LongTailROIAlign) -> Tensor:
        from ._pooling_kernels import roi_align as kernel

        ctx.save_for_backward(rois)
        ctx.shape, ctx.align, ctx.by_point = maps.shape, align, maps.is_contiguous(memory_format=torch.channels_last)
        out = maps.new_empty((len(rois), maps.shape[1], *align.output_size))
        by_point = maps.detach().permute(0, 2, 3, 1).contiguous().numpy()
        boxes = rois.detach().contiguous().numpy()
        scale, ratio, shift, smallest = align._sampling(by_point.dtype.type)
        kernel(by_point, boxes, scale, ratio, shift, smallest, out.numpy())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        from ._pooling_kernels import roi_align_backward as kernel

        (rois,) = ctx.saved_tensors
        images, channels, height, width = ctx.shape
        by_point = grad.new_zeros((images, height, width, channels))
        boxes = rois.detach().contiguous().numpy()
        scale, ratio, shift, smallest = ctx.align._sampling(by_point.numpy().dtype.type)
        kernel(grad.contiguous().numpy(), boxes, scale, ratio, shift, smallest, by_point.numpy())
        out = by_point.permute(0, 3, 1, 2)
        # In the maps' order in memory: convolutions behind choose their algorithm, and so their rounding, by it.
        return out if ctx.by_point else out.contiguous(), None, None


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
