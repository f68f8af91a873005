"""What the softmax losses with an additive class prior share, and what the prior does to background."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lt_det.losses.base import ClassificationLoss
from lt_det.losses.distributed import all_reduce_sum
from lt_det.losses.functional import add_rows, add_vector, log_relative_prior

BACKGROUND_RULES = ("keep", "prior", "official")


class PriorAdjustedLoss(ClassificationLoss):
    """A softmax loss with an additive adjustment ``tau * log pi`` of its logits.

    Background rules, with pi the foreground prior over K classes (it sums to 1):

    * "keep": a_c = tau log(K pi_c), a_bg = 0. The label shift from the training foreground prior to a
      uniform one, with the background prior kept. lt_det's default.
    * "prior": background is a class with a prior of its own, b: a_c = tau log((K+1) (1-b) pi_c), a_bg = tau
      log((K+1) b). What Menon et al. and Ren et al. write for classification, taken literally on K + 1
      classes. b is ``background_fraction``, or the fraction of background RoIs seen so far when that is 0.
    * "official": as "keep", but rows whose label is background are not shifted. The rule of BALMS's
      published detection code (there with sigmoids, see ``BalancedSigmoid``).

    With the "online" prior, pi comes from the running counts of foreground RoIs (all ranks, in the
    checkpoint), each count plus one, updated in training mode before the loss of the batch is computed.
    """

    background_rules = BACKGROUND_RULES

    def __init__(self, num_classes: int, *, tau: float, background_fraction: float, **common):
        super().__init__(num_classes, **common)
        if not 0.0 <= background_fraction < 1.0:
            raise ValueError(
                f"{type(self).__name__}: background_fraction must lie in [0, 1) (0: measured), got"
                f" {background_fraction}"
            )
        self.tau = float(tau)
        self.background_fraction = float(background_fraction)
        self.register_buffer("log_prior", torch.zeros(num_classes), persistent=False)
        self.counts_online = self.prior == "online"
        self.measures_background = self.background == "prior" and self.background_fraction == 0.0
        if self.counts_online or self.measures_background:
            # float64: float32 stops counting at 2^24, which a long training reaches.
            self.register_buffer("roi_count", torch.zeros(num_classes + 1, dtype=torch.float64))

    @property
    def uses_statistics(self) -> bool:
        return self.needs_statistics or self.prior != "online"

    def load_statistics(self, statistics) -> None:
        if not self.counts_online:
            counts = self.class_counts()
            self.log_prior.copy_(log_relative_prior(counts))

    def observe(self, labels: Tensor) -> None:
        """Count the RoIs of a training batch, over all ranks."""
        if self.training and hasattr(self, "roi_count"):
            counts = torch.zeros_like(self.roi_count)
            counts.scatter_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
            self.roi_count += all_reduce_sum(counts)

    def adjustment(self) -> Tensor:
        """(K + 1,) adjustment, background last, by the current prior."""
        num_classes = self.num_classes
        log_prior = self.log_prior  # log(K pi)
        if self.counts_online:
            log_prior = log_relative_prior(self.roi_count[:num_classes] + 1.0).to(log_prior.dtype)
        background = log_prior.new_zeros(1)
        if self.background == "prior":
            if self.measures_background:
                fraction = (self.roi_count[-1:] + 1.0) / (self.roi_count.sum() + 2.0)
            else:
                fraction = torch.full((1,), self.background_fraction, dtype=torch.float64, device=log_prior.device)
            ratio = (num_classes + 1) / num_classes
            log_prior = log_prior + ((1 - fraction) * ratio).log().to(log_prior.dtype)
            background = ((num_classes + 1) * fraction).log().to(log_prior.dtype)
        return self.tau * torch.cat([log_prior, background])

    def adjuster(self, labels: Tensor, dtype: torch.dtype) -> Callable[[Tensor, slice], None]:
        """The ``adjust`` of ``adjusted_cross_entropy`` for these labels."""
        adjustment = self.adjustment().to(dtype)
        if self.background == "official":
            both = torch.stack([adjustment, torch.zeros_like(adjustment)])
            return add_rows(both, (labels == self.num_classes).long())
        return add_vector(adjustment)

    def summary(self) -> str:
        a = self.adjustment()
        rule = f"background rule {self.background!r} (adjustment of background {a[-1].item():+.2f})"
        if self.measures_background:
            rule = f"background rule {self.background!r} (background prior measured from RoIs, now {a[-1].item():+.2f})"
        return (
            f"tau {self.tau:g}, {rule}, prior {self.prior!r} over {self.num_classes} classes, adjustment of"
            f" foreground from {a[:-1].min().item():+.2f} to {a[:-1].max().item():+.2f}"
        )
