"""Weights of classes beside a background class: foreground keeps its share of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import ClassificationLoss
from lt_det.losses.counts import class_counts
from lt_det.losses.distributed import all_reduce_sum

ROI_SHARES = ("statistics", "online")


class ClassWeightedLoss(ClassificationLoss):
    """A loss whose foreground rows are weighted by their class.

    Papers that weight classes have no background, and the scale of their weights (a sum of K, say) cancels. Beside
    background rows of weight 1 it decides how much foreground counts at all: on LVIS v1's counts, effective-number
    weights that sum to K have a mean of 0.026 over foreground RoIs. Here that mean is 1: weights u_c known up to a
    factor become

        w_c = u_c / sum_k q_k u_k,

    with q the shares of the classes among foreground RoIs under the sampler in use.

    Args:
        roi_shares: where q comes from. "statistics": the expected instance counts under the training sampler where the
            statistics have them (a config's always do), else the instance counts. "online": running counts of the
            foreground RoIs seen, over all ranks and kept in the checkpoint; a batch counts before its loss.
    """

    needs_roi_shares = True

    def __init__(self, num_classes: int, *, roi_shares: str = "statistics", **common):
        super().__init__(num_classes, **common)
        if roi_shares not in ROI_SHARES:
            raise ValueError(
                f"{type(self).__name__}: roi_shares is {roi_shares!r}; choose one of {', '.join(ROI_SHARES)}"
            )
        self.roi_shares = roi_shares
        self.register_buffer("unscaled_weights", torch.ones(num_classes, dtype=torch.float64), persistent=False)
        self.register_buffer("class_weights", torch.ones(num_classes + 1, dtype=torch.float64), persistent=False)
        if roi_shares == "online":
            # float64: float32 stops counting at 2^24, which a long training reaches.
            self.register_buffer("roi_count", torch.zeros(num_classes, dtype=torch.float64))

    def set_class_weights(self, weights: Tensor) -> None:
        """Take (K,) weights, known up to a factor; for ``load_statistics``."""
        self.unscaled_weights.copy_(weights)
        self._rescale(self.roi_count if self.roi_shares == "online" else self._shares_from_statistics())

    def observe(self, labels: Tensor) -> None:
        """Count the foreground RoIs of a training batch, over all ranks, where the shares are measured."""
        if self.training and self.roi_shares == "online":
            counts = torch.zeros_like(self.class_weights)
            counts.scatter_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
            self.roi_count += all_reduce_sum(counts)[:-1]
        if self.roi_shares == "online":  # in evaluation too: a checkpoint may have been loaded since
            self._rescale(self.roi_count)

    def _rescale(self, counts: Tensor) -> None:
        mean = (counts * self.unscaled_weights).sum() / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)
        # Nothing was counted yet: as they are.
        self.class_weights[:-1] = self.unscaled_weights / torch.where(mean > 0, mean, torch.ones_like(mean))

    def _shares_from_statistics(self) -> Tensor:
        statistics, name = self.class_statistics(), type(self).__name__
        sampled = getattr(statistics, "sampled_count", None) is not None
        if not sampled and statistics.instance_count is None:
            raise ValueError(
                f"{name}: the class statistics have image counts alone, and its weights need the classes' shares of"
                f" RoIs; set MODEL.LONG_TAIL.{self.config_node}.ROI_SHARES (roi_shares) to 'online'"
            )
        source = "sampled" if sampled else "instance_count"
        counts = class_counts(statistics, source, num_classes=self.num_classes, allow_zero=True, wanted_by=name)
        if not counts.sum() > 0:
            raise ValueError(f"{name}: the class statistics ({source}) must have a positive sum")
        return torch.from_numpy(counts / counts.sum()).to(self.class_weights.device)
