"""Calibrators: they change the scores of a trained model at inference, and nothing else.

A calibrator has no parameters and no buffers, so it leaves the state dict as it is and works on any checkpoint,
stock Detectron2's included. In a cascade each stage is calibrated before the stages' probabilities are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from fvcore.common.registry import Registry
from torch import Tensor

from lt_det.data import PRIOR_SOURCES, ClassStatistics
from lt_det.losses.counts import class_counts

from .classifiers import CosineClassifier

if TYPE_CHECKING:
    from .box_predictor import LongTailOutputLayers

CALIBRATOR_REGISTRY = Registry("CALIBRATOR")
CALIBRATOR_REGISTRY.__doc__ = """
Calibrators by the name that ``MODEL.LONG_TAIL.CALIBRATOR.NAME`` takes: subclasses of :class:`Calibrator`.
"""


class Calibrator:
    """Turns the scores of a box predictor into calibrated probabilities.

    Class attributes:
        parameter: name of the constructor's argument that sets the strength; at 0 the model is as trained.
        uses_statistics: the calibrator reads class statistics.
        background_rules: values that ``background`` takes.
    """

    parameter: str = "tau"
    uses_statistics: bool = True
    background_rules: Sequence[str] = ("keep",)

    def __init__(self, value: float, background: str):
        name = type(self).__name__
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{name}: MODEL.LONG_TAIL.CALIBRATOR.{self.parameter.upper()} ({self.parameter}) must be finite "
                f"and not negative, got {value}"
            )
        if background not in self.background_rules:
            raise ValueError(
                f"{name}: MODEL.LONG_TAIL.CALIBRATOR.BACKGROUND (background) is {background!r}; choose one of "
                f"{', '.join(self.background_rules)}"
            )
        self.value = float(value)
        self.background = background

    def check(self, predictor: LongTailOutputLayers) -> None:
        """Raise ``ValueError`` if this calibrator cannot work on the predictor's loss or classifier."""

    def __call__(self, scores: Tensor, predictor: LongTailOutputLayers) -> Tensor:
        """
        Args:
            scores: ``(R, num_outputs)``, what ``predictor.cls_score`` gave.
            predictor: its loss says how scores become probabilities.

        Returns:
            ``(R, K + 1)`` probabilities, background last.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the log."""
        return f"{type(self).__name__}: {self.parameter} {self.value:g}, background rule {self.background!r}"


class PriorCalibrator(Calibrator):
    """Multiplies what speaks for class c by a weight w_c that follows from how often the class was trained on.

    Where the probabilities of a RoI are mutually exclusive (softmax losses and Seesaw), with p as trained:

    * ``"keep"``: p'_c = p_c w_c / (sum_j p_j w_j + p_bg). Background has weight 1.
    * ``"objectness"``: p'_bg = p_bg and p'_c = (1 - p_bg) p_c w_c / sum_j p_j w_j. What the RoI is not is left
      alone, and only the classes change places.

    Where each class is decided by itself (sigmoid losses, BAGS), every class has a background of its own, of weight 1:
    p'_c = p_c w_c / (p_c w_c + 1 - p_c), that is sigmoid(z_c + log w_c). The rule is then ``"keep"``.
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
            prior: source of the counts: ``"image_count"``, ``"instance_count"`` or ``"sampled"``.
            background: see above.
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
        self._log_weights: Tensor | None = None

    def log_weights_from(self, counts: np.ndarray) -> np.ndarray:
        """(K,) float64 log w of positive counts (K,)."""
        raise NotImplementedError

    def log_weights(self, num_classes: int) -> Tensor:
        """(K,) float64 log w.

        Raises:
            ValueError: if there are no statistics, counts of 0, or counts of another number of classes.
        """
        if self._log_weights is None:
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
            self._log_weights = torch.from_numpy(self.log_weights_from(counts))
        return self._log_weights

    def check(self, predictor: LongTailOutputLayers) -> None:
        if self.background != "keep" and not predictor.loss.mutually_exclusive:
            raise ValueError(
                f"{type(self).__name__}: MODEL.LONG_TAIL.CALIBRATOR.BACKGROUND {self.background!r} is for losses with "
                f"mutually exclusive classes, and {type(predictor.loss).__name__} decides each class by itself; set "
                'it to "keep"'
            )

    def __call__(self, scores: Tensor, predictor: LongTailOutputLayers) -> Tensor:
        probs = predictor.loss.activation(scores)
        if self.value == 0:
            return probs
        self.check(predictor)
        dtype = torch.promote_types(probs.dtype, torch.float32)
        weights = self.log_weights(predictor.num_classes).exp().to(probs.device, dtype)
        own, background = probs[:, :-1].to(dtype), probs[:, -1:].to(dtype)
        weighted = own * weights
        if not predictor.loss.mutually_exclusive:
            own = weighted / (weighted + (1 - own))
        elif self.background == "keep":
            total = weighted.sum(dim=1, keepdim=True) + background
            own, background = weighted / total, background / total
        else:
            # A RoI that is background beyond doubt leaves nothing to share out.
            total = weighted.sum(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            own = (1 - background) * weighted / total
        return torch.cat([own, background], dim=1)

    def describe(self) -> str:
        return f"{super().describe()}, prior {self.prior!r}"


@CALIBRATOR_REGISTRY.register()
class LogitAdjustment(PriorCalibrator):
    """Post-hoc logit adjustment: z_c - tau log(K pi_c). Menon et al., ICLR 2021, eq. 9, with w_c = (K pi_c)^-tau.

    The background's score stays: the label shift from the training prior of the foreground to a uniform one, as
    in ``LogitAdjusted`` with the background rule "keep". Uniform counts change nothing.

    Args:
        tau: strength; 1 assumes that the validation set is uniform over classes, 0 that it is as the training set.
        statistics, prior, background, min_count: see :class:`PriorCalibrator`.
    """

    def __init__(
        self,
        tau: float = 1.0,
        *,
        statistics=None,
        prior: str = "image_count",
        background: str = "keep",
        min_count: float = 0.0,
    ):
        super().__init__(tau, statistics=statistics, prior=prior, background=background, min_count=min_count)

    def log_weights_from(self, counts: np.ndarray) -> np.ndarray:
        return -self.value * np.log(counts * (len(counts) / counts.sum()))


@CALIBRATOR_REGISTRY.register()
class NorCal(PriorCalibrator):
    """Normalised calibration: w_c = N_c^-gamma. Pan et al., NeurIPS 2021.

    N_c is the count of the class itself and not its share, so the larger the data set, the more background gains:
    that is how the method is published (background has no count, weight 1, and takes part in the normalisation).

    The published code is for softmax alone. On sigmoid losses the same rule is applied to each class and its own
    background, a softmax of z_c and 0: s_c w_c / (s_c w_c + 1 - s_c) = sigmoid(z_c - gamma log N_c) with s_c =
    sigmoid(z_c).

    Args:
        gamma: strength.
        statistics, prior, background, min_count: see :class:`PriorCalibrator`; the published code counts images.
    """

    parameter = "gamma"

    def __init__(
        self,
        gamma: float = 0.6,
        *,
        statistics=None,
        prior: str = "image_count",
        background: str = "keep",
        min_count: float = 0.0,
    ):
        super().__init__(gamma, statistics=statistics, prior=prior, background=background, min_count=min_count)

    def log_weights_from(self, counts: np.ndarray) -> np.ndarray:
        return -self.value * np.log(counts)


@CALIBRATOR_REGISTRY.register()
class TauNorm(Calibrator):
    """Tau-normalised classifier: class weights w_c / ||w_c||^tau. Kang et al., ICLR 2020, section 4.

    Computed from the scores, z'_c = (z_c - b_c) / ||w_c||^tau + b_c, so the model keeps its weights. The paper has no
    background; the rules are

    * ``"keep"``: the row of the background (and other outputs that are no class) stays as trained, and the norms of the
      classes are taken relative to their geometric mean, so that the classes as a whole keep their scale
      against it. The ranking among classes is the paper's.
    * ``"normalize"``: every row is divided by its own norm to the power of tau, the background's too.

    Args:
        tau: exponent; 0 leaves the classifier as it is, 1 makes all norms equal.
        background: ``"keep"`` or ``"normalize"``.
        drop_bias: leave out the biases of the normalised rows, as the paper's experiments do. In a detector they carry
            what the background takes, so they are kept by default.
    """

    uses_statistics = False
    background_rules = ("keep", "normalize")

    def __init__(self, tau: float = 1.0, *, background: str = "keep", drop_bias: bool = False):
        super().__init__(tau, background)
        self.drop_bias = bool(drop_bias)

    def check(self, predictor: LongTailOutputLayers) -> None:
        classifier = predictor.cls_score
        if isinstance(classifier, CosineClassifier) or predictor.loss.wants_cosine:
            raise ValueError(
                "TauNorm has no effect on a cosine classifier, whose weights are normalised already; set "
                "MODEL.LONG_TAIL.CALIBRATOR.NAME to LogitAdjustment or NorCal"
            )
        weight = getattr(classifier, "weight", None)
        if weight is None or weight.dim() != 2:
            raise ValueError(
                f"TauNorm needs a linear classifier with a weight of shape (outputs, features), and cls_score is a "
                f"{type(classifier).__name__}"
            )

    def __call__(self, scores: Tensor, predictor: LongTailOutputLayers) -> Tensor:
        if self.value > 0 or self.drop_bias:
            self.check(predictor)
            scores = self._normalised(scores, predictor.cls_score, predictor.num_classes)
        return predictor.loss.activation(scores)

    def _normalised(self, scores: Tensor, classifier, num_classes: int) -> Tensor:
        norms = classifier.weight.detach().float().norm(dim=1)
        # A class that was never trained on can have a weight of zero: its scores are all bias anyway.
        log_norms = norms.clamp(min=torch.finfo(norms.dtype).tiny).log()
        if self.background == "keep":
            log_norms = log_norms - log_norms[:num_classes].mean()
            log_norms[num_classes:] = 0
        factors = torch.exp(-self.value * log_norms)
        bias = getattr(classifier, "bias", None)
        if bias is None:
            return scores * factors.to(scores.dtype)
        bias = bias.detach().float()
        kept = bias
        if self.drop_bias:
            kept = bias.clone()
            kept[: num_classes if self.background == "keep" else len(kept)] = 0
        return ((scores.float() - bias) * factors + kept).to(scores.dtype)

    def describe(self) -> str:
        return f"{super().describe()}, biases {'dropped' if self.drop_bias else 'kept'}"
