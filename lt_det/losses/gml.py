"""GML: mutual-information training with class-wise queues of a teacher's features.

Suh and Seo, "Long-Tailed Recognition by Mutual Information Maximization between Latent Features and
Ground-Truth Labels", ICML 2023, brought to RoI features. :class:`GML` is the detector's loss, the part of
the method that is still there at inference; what only training needs is in ``lt_det.gml``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.kernels import adjusted_cross_entropy, compute_dtype
from lt_det.losses.prior_adjusted import PriorAdjustedLoss

# Cosines lie in [-1, 1], so exp((q.k - 1) / T) in [exp(-2 / T), 1]: from this temperature on the smallest is
# exp(-66.7) = 1e-29, far from where float32 loses digits (1e-38, T = 0.023). So 1 / T is shift enough, and
# the maximum that a log-sum-exp usually subtracts, one more pass over (R, M), is not needed.
MIN_TEMPERATURE = 0.03


@LOSS_REGISTRY.register()
class GML(PriorAdjustedLoss):
    """GML's supervised loss: gamma CE(cos / T_s + a, y), and the settings of the whole method.

    Suh and Seo, ICML 2023: gamma L_cls + beta L_GML + alpha L_KD. Scores are cosines. The adjustment a, its
    prior and its background rules are those of :class:`PriorAdjustedLoss` with tau = 1. L_GML and L_KD are
    computed by ``lt_det.gml.MutualInformation``, a module that the trainer puts beside the detector when
    ``wants_keys`` is set: their weights and sizes are options here so that one config node has them all.

    The branch weighs classes by the prior too. With the "online" prior, which starts from nothing, L_cls goes
    by it, but the queues must be laid out before the first RoI is seen: the branch then takes the instance
    counts of the class statistics, what the running counts of RoIs come close to.

    Args:
        supervised_temperature: T_s, which divides the cosines of L_cls.
        gamma, beta, alpha: weights of L_cls, L_GML and L_KD (distillation of the teacher's scores). With both
            beta and alpha 0 there is no branch; the teacher is trained so.
        distillation_temperature: softens both distributions of L_KD.
        queue_size: Q, keys of all classes.
        queue_base: keys that each class has at least.
        queue_dtype: "float32", or "bfloat16" for half the memory.
        temperature: T of L_GML, or where learning it starts.
        learn_temperature: "shared": one for all classes, as in the published code; "class": one for each; "": fixed.
        own_keys: whether a RoI sees the keys of its own ground-truth box, which earlier epochs left in the queues.
            "seen": it does, and the gradient of T alone passes over them, as in the published code. "hidden": it does
            not; a class whose only box it comes from has no loss then.
        projection_dim: d, width of queries and keys.
        hidden_dim: width between the two layers of a projection. A departure: the published code has the width of the
            input (0 here), which makes the projection of all keys of LVIS several times dearer.
        projection_norm: "BN", or "LN" for batches with few foreground RoIs a GPU.
        background_fraction: with ``background="prior"``, the fraction of RoIs that are background; 0:
            measured.
    """

    config_node = "GML"
    wants_cosine = True
    wants_keys = True
    queue_dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}

    def __init__(
        self,
        num_classes: int,
        *,
        supervised_temperature: float = 1 / 30,
        gamma: float = 1.0,
        beta: float = 1.0,
        alpha: float = 0.0,
        distillation_temperature: float = 4.0,
        queue_size: int = 16384,
        queue_base: int = 3,
        queue_dtype: str = "float32",
        temperature: float = 0.07,
        learn_temperature: str = "shared",
        own_keys: str = "seen",
        projection_dim: int = 128,
        hidden_dim: int = 128,
        projection_norm: str = "BN",
        background_fraction: float = 0.0,
        **common,
    ):
        super().__init__(num_classes, tau=1.0, background_fraction=background_fraction, **common)
        for name, value in (
            ("supervised_temperature", supervised_temperature),
            ("distillation_temperature", distillation_temperature),
        ):
            if value <= 0:
                raise ValueError(f"GML: {name} must be positive, got {value}")
        for name, value in (("gamma", gamma), ("beta", beta), ("alpha", alpha)):
            if value < 0:
                raise ValueError(f"GML: {name}, a weight, must not be negative, got {value}")
        if temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"GML: temperature must be at least {MIN_TEMPERATURE} (float32 underflows below), got {temperature}"
            )
        for name, value, known in (
            ("queue_dtype", queue_dtype, tuple(self.queue_dtypes)),
            ("learn_temperature", learn_temperature, ("class", "shared", "")),
            ("own_keys", own_keys, ("seen", "hidden")),
            ("projection_norm", projection_norm, ("BN", "LN")),
        ):
            if value not in known:
                raise ValueError(f"GML: {name} is {value!r}; choose one of {', '.join(map(repr, known))}")
        if projection_dim < 1 or hidden_dim < 0:
            raise ValueError(
                "GML: projection_dim must be positive and hidden_dim not negative (0: as wide as the"
                f" features), got {projection_dim} and {hidden_dim}"
            )
        self.supervised_temperature = float(supervised_temperature)
        self.gamma, self.beta, self.alpha = float(gamma), float(beta), float(alpha)
        self.distillation_temperature = float(distillation_temperature)
        self.queue_size, self.queue_base = int(queue_size), int(queue_base)
        self.queue_dtype = queue_dtype
        self.temperature = float(temperature)
        self.learn_temperature = learn_temperature
        self.own_keys = own_keys
        self.projection_dim, self.hidden_dim = int(projection_dim), int(hidden_dim)
        self.projection_norm = projection_norm
        self.wants_keys = self.beta > 0 or self.alpha > 0

    def branch_counts(self) -> Tensor:
        """(K,) float64 class counts by which the branch sizes its queues and weighs classes."""
        return self.class_counts("instance_count" if self.prior == "online" else self.prior)

    def activation(self, scores: Tensor) -> Tensor:
        return (scores / self.supervised_temperature).softmax(dim=1)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        self.observe(labels)
        adjust = self.adjuster(labels, compute_dtype(scores.dtype))
        losses = adjusted_cross_entropy(scores, labels, scale=1.0 / self.supervised_temperature, adjust=adjust)
        return self.gamma * mean_over_rows(losses, roi_weights, scores)

    def summary(self) -> str:
        return (
            f"L_cls weight {self.gamma:g}, T_s {self.supervised_temperature:.4g}, {super().summary()}; L_GML"
            f" weight {self.beta:g}, distillation weight {self.alpha:g}"
        )
