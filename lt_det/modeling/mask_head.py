"""Mask heads that compute one channel of a RoI, its class's; the normalised predictor."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

# RoIs that go through the head at a time on a CPU: what a layer writes, the next one finds in the cache.
ROIS_AT_A_TIME = 16
# Of the norms: where the last ReLU lets almost nothing through, the direction of a feature is noise.
EPS = 1e-6


def class_channel(x: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """Of the 1x1 convolution of ``x``, the channel ``classes[i]`` of each row i.

    Args:
        x: ``(B, D, H, W)``. weight: ``(K, D, 1, 1)``. bias: ``(K,)`` or None. classes: ``(B,)`` int64.

    Returns:
        ``(B, 1, H, W)``
    """
    height, width = x.shape[-2:]
    rows, columns = weight.flatten(1)[classes].unsqueeze(1), x.flatten(2)
    if bias is None:
        logits = torch.bmm(rows, columns)
    else:
        logits = torch.baddbmm(bias[classes][:, None, None], rows, columns)
    return logits.unflatten(2, [height, width])


def _joined(classes: list[Tensor], like: Tensor) -> Tensor:
    return cat(classes) if len(classes) > 0 else torch.zeros([0], dtype=torch.int64, device=like.device)


class NormalizedConv1x1(nn.Module):
    """Logits are ``scale * cos(feature of the pixel, class weight) + bias``.

    Wang et al., "Seesaw Loss", CVPR 2021, section 3.3, for the mask head. Weight and bias have the names and shapes of
    the 1x1 convolution that it replaces.

    Args:
        in_channels: D. out_channels: number of classes. scale: the factor on the cosine.
    """

    def __init__(self, in_channels: int, out_channels: int, *, scale: float = 20.0):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"MODEL.LONG_TAIL.MASK_SCALE (scale) must be positive, not {scale}")
        layer = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = float(scale)
        self.eps = EPS  # TorchScript knows no global numbers
        nn.init.normal_(self.weight, std=0.001)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D, H, W)`` features to ``(B, out_channels, H, W)`` logits."""
        return F.conv2d(F.normalize(x, dim=1, eps=self.eps), self.effective_weight(), self.bias)

    def of_classes(self, x: Tensor, classes: Tensor) -> Tensor:
        """``(B, D, H, W)`` features to ``(B, 1, H, W)`` logits of the classes ``(B,)``."""
        return class_channel(F.normalize(x, dim=1, eps=self.eps), self.effective_weight(), self.bias, classes)

    def effective_weight(self) -> Tensor:
        """The normalised weights times the scale."""
        return self.scale * F.normalize(self.weight, dim=1, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, scale={self.scale}"


@ROI_MASK_HEAD_REGISTRY.register()
class LongTailMaskHead(MaskRCNNConvUpsampleHead):
    """``MaskRCNNConvUpsampleHead`` that computes the channel of a RoI's class alone: the ground truth's in training,
    the predicted one at inference.

    The stock head computes all K channels and drops all but one. Losses, gradients, masks and checkpoints are the
    stock head's, up to the rounding of the last product. The long-tail ROI heads put it in the stock head's place.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, **kwargs):
        super().__init__(input_shape, **kwargs)
        # Before deconv, deconv_relu and predictor; TorchScript knows no length of a module.
        self._convolutions = len(self) - 3
        self._rois_at_a_time = ROIS_AT_A_TIME

    def forward(self, x: Tensor, instances: list[Instances]):
        """As ``BaseMaskRCNNHead.forward``."""
        if self.training:
            return self._losses(x, instances)
        classes = _joined([i.pred_classes for i in instances], x)
        # A trace would keep the number of parts.
        if torch.jit.is_tracing() or not x.is_cpu or len(x) == 0:
            logits = self._logits(x, classes)
        else:
            logits = self._logits_by_box(x, classes, instances)
        # One channel is what Detectron2's two functions take for a mask without a class.
        mask_rcnn_inference(logits, instances)
        return instances

    @torch.jit.unused
    def _losses(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        classes = _joined([i.gt_classes.to(torch.int64) for i in instances if len(i)], x)
        return {"loss_mask": mask_rcnn_loss(self._logits(x, classes), instances, self.vis_period) * self.loss_weight}

    def _logits_by_box(self, x: Tensor, classes: Tensor, instances: list[Instances]) -> Tensor:
        """``_logits``, some RoIs at a time, and those of one box once: a box that has several classes, as boxes that no
        class refines have among 300 detections, is one RoI."""
        rois = cat([F.pad(i.pred_boxes.tensor, [1, 0], value=float(k)) for k, i in enumerate(instances)])
        _, of_box, number = torch.unique(rois, dim=0, return_inverse=True, return_counts=True)
        order = of_box.argsort(stable=True)  # the RoIs box by box
        # A row of the weight is a quarter of an output channel.
        weight, bias = self.deconv.weight.flatten(1).t().contiguous()[:, :, None, None], self.deconv.bias
        if bias is not None:
            bias = bias.repeat_interleave(4)
        begin, parts = 0, []
        for numbers in number.split(self._rois_at_a_time):
            mine = order[begin : begin + int(numbers.sum())]
            first = mine[numbers.cumsum(0) - numbers]
            features = self._features_by_quarter(x[first], weight, bias)
            box = of_box[mine] - of_box[mine[0]]
            if len(first) == len(mine):
                parts.append(self._logits_of_features(features, classes[mine]))
            elif self.predictor.weight.shape[0] == 1:  # the classes of a box have the same mask
                parts.append(self._logits_of_features(features, classes[first])[box])
            else:
                for some, of in zip(mine.split(2 * self._rois_at_a_time), box.split(2 * self._rois_at_a_time)):
                    parts.append(self._logits_of_features(features[of], classes[some]))
            begin += len(mine)
        logits = cat(parts)
        logits = torch.empty_like(logits).index_copy_(0, order, logits)
        height, width = x.shape[-2:]  # (B, 2 * 2 * H, W) to (B, 1, 2H, 2W)
        quarters = logits.reshape(-1, 2, 2, height, width).permute(0, 3, 1, 4, 2)
        return quarters.reshape(-1, 1, 2 * height, 2 * width)

    def _features_by_quarter(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What ``_features`` gives, as ``(B, D, 4H, W)``: first the upper left quarters of all pixels of ``x``, then
        the upper right ones and so on. The predictor looks at single pixels, in any order.

        The transposed convolution has a kernel and a stride of 2, so that a pixel's quarters come from the pixel alone:
        a 1x1 convolution by ``weight (4D, C, 1, 1)`` and ``bias``, whose result need not be moved.
        """
        x = self._convolved(x)
        quarters = self.deconv_relu(F.conv2d(x, weight, bias))
        return quarters.reshape(x.shape[0], -1, 4 * x.shape[2], x.shape[3])

    def _logits(self, x: Tensor, classes: Tensor) -> Tensor:
        """``(B, C, H, W)`` RoI features to ``(B, 1, 2H, 2W)`` logits of the classes ``(B,)``."""
        return self._logits_of_features(self._features(x), classes)

    def _features(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` RoI features to ``(B, D, 2H, 2W)``, the input of the predictor."""
        x, bias = self._convolved(x), self.deconv.bias
        if bias is not None and x.is_cpu and x.dtype == torch.bfloat16:
            # oneDNN takes six times as long for the gradient of a transposed convolution that adds a bias itself.
            x = F.conv_transpose2d(x, self.deconv.weight, None, self.deconv.stride)
            return self.deconv_relu(x.add_(bias.to(x.dtype)[:, None, None]))
        return self.deconv_relu(self.deconv(x))

    def _convolved(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` RoI features to ``(B, C', H, W)``, the input of the transposed convolution."""
        for number, layer in enumerate(self):
            if number < self._convolutions:
                x = layer(x)
        return x

    def _logits_of_features(self, x: Tensor, classes: Tensor) -> Tensor:
        if self.predictor.weight.shape[0] == 1:  # one channel for all classes
            return self.predictor(x)
        return self.logits_of(x, classes)

    def logits_of(self, x: Tensor, classes: Tensor) -> Tensor:
        """``(B, D, H, W)`` input of the predictor to ``(B, 1, H, W)`` logits of the classes ``(B,)``."""
        return class_channel(x, self.predictor.weight, self.predictor.bias, classes)


@ROI_MASK_HEAD_REGISTRY.register()
class NormalizedMaskRCNNConvUpsampleHead(LongTailMaskHead):
    """``LongTailMaskHead`` with a normalised predictor. Its checkpoints have the stock head's names and shapes.

    Args:
        predictor_scale: the factor on the cosines (``MODEL.LONG_TAIL.MASK_SCALE``).
        input_shape, num_classes, kwargs: of ``MaskRCNNConvUpsampleHead``.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_classes: int, predictor_scale: float = 20.0, **kwargs):
        super().__init__(input_shape, num_classes=num_classes, **kwargs)
        stock = self.predictor
        self.predictor = NormalizedConv1x1(stock.in_channels, stock.out_channels, scale=predictor_scale)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["predictor_scale"] = cfg.MODEL.LONG_TAIL.MASK_SCALE
        return ret

    def logits_of(self, x: Tensor, classes: Tensor) -> Tensor:
        return self.predictor.of_classes(x, classes)


def with_long_tail_mask_head(cfg: CfgNode) -> CfgNode:
    """The config with ``LongTailMaskHead`` where it names the stock head; any other head stays."""
    if cfg.MODEL.ROI_MASK_HEAD.NAME != MaskRCNNConvUpsampleHead.__name__:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_MASK_HEAD.NAME = LongTailMaskHead.__name__
    return cfg
