"""Pairwise margin loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.class_weights import ClassWeightedLoss
from lt_det.losses.functional import add_rows, ldam_margins, log_relative_prior, subtract_target_margin
from lt_det.losses.kernels import adjusted_cross_entropy, compute_dtype


@LOSS_REGISTRY.register()
class PairwiseMargin(ClassWeightedLoss):
    """Pairwise margin loss: alpha_y log(1 + sum_{c != y} exp(delta_{y,c} + z_c - z_y)).

    Menon et al., ICLR 2021, eq. 11, with their named special cases (pi = prior of the K foreground classes,
    a_c = log(K pi_c)):

    ==================  ============  ==================================================================
    setting             alpha_y       delta_{y,c}
    ==================  ============  ==================================================================
    "logit_adjusted"    1             tau (a_c - a_y), as ``LogitAdjusted``
    "equalized"         1             tau log(pi_c / max pi) <= 0 (Tan et al.)
    "class_balanced"    u / pi_y      0
    "ldam"              1             pi_y^(-1/4), scaled to a maximum of ``max_margin`` (Cao et al.)
    ==================  ============  ==================================================================

    "equalized" is their reading of Tan et al., CVPR 2020 (their eq. 6 and section 5.2): delta = log F(pi_c)
    with F non-decreasing and at most 1. They leave F open and name F(z) = z^tau (in their experiment, tau =
    1); here it is (z / max pi)^tau, whose margins are all larger by tau log(1 / max pi), so that the most
    frequent class has none, and uniform counts give plain cross entropy.

    The factor u of "class_balanced" makes the mean of alpha over foreground RoIs 1, see :class:`ClassWeightedLoss`
    (theirs, 1 / K, does so where RoIs follow the prior). Background has a_bg = 0, alpha 1 and no margin of its own
    ("keep"); under "equalized" background rows have no margins at all, as in Tan et al., who do not exempt them.

    Args:
        setting: a name of the table.
        tau: strength of "logit_adjusted" and "equalized".
        max_margin: largest margin of "ldam".
        roi_shares: where the classes' shares of foreground RoIs come from, for "class_balanced": "statistics" or
            "online".
    """

    config_node = "PAIRWISE_MARGIN"
    needs_statistics = True
    prior_sources = ("image_count", "instance_count", "sampled")
    settings = ("logit_adjusted", "equalized", "class_balanced", "ldam")

    def __init__(
        self,
        num_classes: int,
        *,
        setting: str = "logit_adjusted",
        tau: float = 1.0,
        max_margin: float = 0.5,
        roi_shares: str = "statistics",
        **common,
    ):
        super().__init__(num_classes, roi_shares=roi_shares, **common)
        if setting not in self.settings:
            raise ValueError(f"PairwiseMargin: setting is {setting!r}; choose one of {', '.join(self.settings)}")
        self.setting = setting
        self.tau = float(tau)
        self.max_margin = float(max_margin)
        # delta_{y,c} = row_margin[y] + column_margin[c] for every setting, so no (K, K) matrix is needed.
        for name in ("row_margin", "column_margin"):
            self.register_buffer(name, torch.zeros(num_classes + 1), persistent=False)

    def load_statistics(self, statistics) -> None:
        counts = self.class_counts()
        a = log_relative_prior(counts)
        row, column = torch.zeros_like(a), torch.zeros_like(a)
        if self.setting == "logit_adjusted":
            row, column = -self.tau * a, self.tau * a
        elif self.setting == "equalized":
            column = self.tau * (a - a.max())
        elif self.setting == "class_balanced":
            self.set_class_weights((-a).exp())
        else:
            row = ldam_margins(counts, self.max_margin)
        self.row_margin[:-1], self.column_margin[:-1] = row, column

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        self.observe(labels)
        dtype = compute_dtype(scores.dtype)
        column, row = self.column_margin.to(dtype), self.row_margin.to(dtype)
        # By row: 0 foreground, 1 background.
        exempt = torch.zeros_like(column) if self.setting == "equalized" else column
        by_kind = torch.stack([column, exempt])
        add_columns = add_rows(by_kind, (labels == self.num_classes).long())
        # What the row adds to all other classes is taken from the label instead, with what the column added
        # to it.
        own_column = torch.cat([column[:-1], exempt[-1:]])
        subtract_own = subtract_target_margin(row + own_column, labels)

        def adjust(z: Tensor, rows: slice) -> None:
            add_columns(z, rows)
            subtract_own(z, rows)

        losses = adjusted_cross_entropy(scores, labels, adjust=adjust) * self.class_weights.to(dtype)[labels]
        return mean_over_rows(losses, roi_weights, scores)

    def summary(self) -> str:
        return (
            f"setting {self.setting!r}, background rule 'keep', prior {self.prior!r} over {self.num_classes}"
            f" classes, margins of rows from {self.row_margin.min():+.2f} to {self.row_margin.max():+.2f}, of"
            f" columns from {self.column_margin.min():+.2f} to {self.column_margin.max():+.2f}, alpha from"
            f" {self.class_weights[:-1].min():.3g} to {self.class_weights[:-1].max():.3g}"
        )
