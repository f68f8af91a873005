"""Tau-norm: class weights divided by a power of their norm."""

import torch
from torch import Tensor

from ..classifiers import CosineClassifier
from .base import CALIBRATOR_REGISTRY, Calibrator, Predictor


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
        background: "keep": its weight stays; "normalize": it is divided by its norm too.
        drop_bias: leave out the biases of the normalised rows, as the paper's experiments do. In a detector they carry
            what the background takes, so they are kept by default.
    """

    uses_statistics = False
    background_rules = ("keep", "normalize")

    def __init__(self, tau: float = 1.0, *, background: str = "keep", drop_bias: bool = False):
        super().__init__(tau, background)
        self.drop_bias = bool(drop_bias)
        self.factors = torch.ones(0)
        self.bias: Tensor | None = None
        self.kept_bias: Tensor | None = None

    def check(self, predictor: Predictor) -> None:
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

    def prepare(self, predictor: Predictor) -> None:
        if not self._acts():
            return
        self.check(predictor)
        classifier, num_classes = predictor.cls_score, predictor.num_classes
        norms = classifier.weight.detach().float().norm(dim=1)
        # A class that was never trained on can have a weight of zero: its scores are all bias anyway.
        log_norms = norms.clamp(min=torch.finfo(norms.dtype).tiny).log()
        if self.background == "keep":
            log_norms = log_norms - log_norms[:num_classes].mean()
            log_norms[num_classes:] = 0
        self.factors = torch.exp(-self.value * log_norms)
        bias = getattr(classifier, "bias", None)
        self.bias = self.kept_bias = None if bias is None else bias.detach().float()
        if bias is not None and self.drop_bias:
            self.kept_bias = self.bias.clone()
            self.kept_bias[: num_classes if self.background == "keep" else len(bias)] = 0

    def _acts(self) -> bool:
        return self.value > 0 or self.drop_bias

    def adjust_scores(self, scores: Tensor) -> Tensor:
        if not self._acts():
            return scores
        factors, bias, kept = self.factors.to(scores.device), self.bias, self.kept_bias
        if bias is None or kept is None:
            return scores * factors.to(scores.dtype)
        return ((scores.float() - bias.to(scores.device)) * factors + kept.to(scores.device)).to(scores.dtype)

    def describe(self) -> str:
        return f"{super().describe()}, biases {'dropped' if self.drop_bias else 'kept'}"
