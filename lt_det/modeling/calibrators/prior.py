"""Calibrators that weigh each class by how often it was trained on."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lt_det.data import PRIOR_SOURCES, ClassStatistics
from lt_det.losses.counts import class_counts

from .base import Calibrator, Predictor


def weighted_odds(probs: Tensor, weights: Tensor) -> Tensor:
    """(R, K) probabilities whose odds, each for itself, are multiplied by (K,) weights."""
    weighted = probs * weights
    return weighted / (weighted + (1 - probs))


class PriorCalibrator(Calibrator):
    """Multiplies what speaks for class c by a weight w_c that follows from the class statistics.

    Where the probabilities of a RoI are mutually exclusive (softmax losses and Seesaw), with p as trained:

    * ``"keep"``: p'_c = p_c w_c / (sum_j p_j w_j + p_bg). Background has weight 1.
    * ``"objectness"``: p'_bg = p_bg and p'_c = (1 - p_bg) p_c w_c / sum_j p_j w_j. What the RoI is not is left
      alone, and only the classes change places.

    Where each class is decided by itself (sigmoid losses, BAGS), every class has a background of its own, of weight 1:
    p'_c = p_c w_c / (p_c w_c + 1 - p_c), that is sigmoid(z_c + log w_c). The rule is then ``"keep"``.

    Args:
        prior: where the classes are counted: "image_count", "instance_count" or "sampled" (expected instances under the
            training sampler).
        background: "keep": its score stays; "objectness" (softmax losses): its probability stays.
    """

    background_rules = ("keep", "objectness")

    def __init__(
        self,
        value: float,
        *,
        statistics: ClassStatistics | Callable[[], ClassStatistics] | None,
        prior: str,
        background: str,
        min_count: float,
    ):
        """
        Args:
            value: strength, at least 0.
            statistics: class statistics of the training set, or a callable that returns them when first needed.
            prior, background: see above.
            min_count: counts below this are raised to it; 0 makes a class without training images an error.
        """
        super().__init__(value, background)
        if prior not in PRIOR_SOURCES:
            raise ValueError(
                f"{type(self).__name__}: MODEL.LONG_TAIL.CALIBRATOR.PRIOR (prior) is {prior!r}; choose one of "
                f"{', '.join(PRIOR_SOURCES)}"
            )
        self.prior = prior
        self.min_count = float(min_count)
        self._statistics = statistics
        self._log_weights: dict[bool, Tensor] = {}
        self.exclusive = True
        self.tiny = torch.finfo(torch.float32).tiny
        self.weights = torch.ones(0, dtype=torch.float64)

    def log_weights_from(
        self, counts: np.ndarray, statistics: ClassStatistics, *, mutually_exclusive: bool
    ) -> np.ndarray:
        """(K,) float64 log w of positive counts (K,).

        Args:
            statistics: where the counts are from, for those that read more of them.
            mutually_exclusive: of the loss.
        """
        raise NotImplementedError

    def log_weights(self, num_classes: int, *, mutually_exclusive: bool = True) -> Tensor:
        """(K,) float64 log w.

        Raises:
            ValueError: if there are no statistics, counts of 0, or counts of another number of classes.
        """
        if mutually_exclusive not in self._log_weights:
            name = type(self).__name__
            statistics = self._statistics() if callable(self._statistics) else self._statistics
            if statistics is None:
                raise ValueError(
                    f"{name} needs class statistics: pass statistics=ClassStatistics(...), or set DATASETS.TRAIN or "
                    "MODEL.LONG_TAIL.STATISTICS"
                )
            counts = class_counts(
                statistics, self.prior, num_classes=num_classes, min_count=self.min_count, wanted_by=name
            )
            weights = self.log_weights_from(counts, statistics, mutually_exclusive=mutually_exclusive)
            self._log_weights[mutually_exclusive] = torch.from_numpy(weights)
        return self._log_weights[mutually_exclusive]

    def check(self, predictor: Predictor) -> None:
        if self.background != "keep" and not predictor.loss.mutually_exclusive:
            raise ValueError(
                f"{type(self).__name__}: MODEL.LONG_TAIL.CALIBRATOR.BACKGROUND {self.background!r} is for losses with "
                f"mutually exclusive classes, and {type(predictor.loss).__name__} decides each class by itself; set "
                'it to "keep"'
            )

    def independent(self, probs: Tensor, weights: Tensor) -> Tensor:
        """(R, K) probabilities of classes that are decided by themselves, calibrated by (K,) weights."""
        return weighted_odds(probs, weights)

    def prepare(self, predictor: Predictor) -> None:
        if self.value == 0:
            return
        self.check(predictor)
        exclusive, device = predictor.loss.mutually_exclusive, predictor.cls_score.weight.device
        if len(self.weights) and exclusive == self.exclusive and device == self.weights.device:
            return  # a copy from the host makes it wait for a GPU
        self.exclusive = exclusive
        self.weights = self.log_weights(predictor.num_classes, mutually_exclusive=exclusive).exp().to(device)

    def adjust_probabilities(self, probs: Tensor) -> Tensor:
        if self.value == 0:
            return probs
        dtype = torch.promote_types(probs.dtype, torch.float32)
        weights = self.weights.to(probs.device, dtype)
        own, background = probs[:, :-1].to(dtype), probs[:, -1:].to(dtype)
        if not self.exclusive:
            own = self.independent(own, weights)
        elif self.background == "keep":
            weighted = own * weights
            total = weighted.sum(dim=1, keepdim=True) + background
            own, background = weighted / total, background / total
        else:
            weighted = own * weights
            # A RoI that is background beyond doubt leaves nothing to share out.
            total = weighted.sum(dim=1, keepdim=True).clamp(min=self.tiny)
            own = (1 - background) * weighted / total
        return torch.cat([own, background], dim=1)

    def describe(self) -> str:
        return f"{super().describe()}, prior {self.prior!r}"
