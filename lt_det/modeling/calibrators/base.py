"""What every calibrator shares: its contract, its strength and its rule for background."""

# Annotations are no strings in these files: torch.jit reads those of the methods that it compiles.

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from lt_det.losses import ClassificationLoss

CALIBRATOR_REGISTRY = Registry("CALIBRATOR")
CALIBRATOR_REGISTRY.__doc__ = """
Calibrators by the name that ``MODEL.LONG_TAIL.CALIBRATOR.NAME`` takes: subclasses of :class:`Calibrator`. Their
arguments with a default are the keys of that node; calibrators that share a key share its default.
"""


class Predictor(Protocol):
    """What a calibrator sees of a box predictor: one of a cascade knows its stage, from 0 on."""

    loss: ClassificationLoss
    cls_score: nn.Module
    num_classes: int
    cascade_stage: int | None


class Calibrator(nn.Module):
    """Turns the scores of a box predictor into calibrated probabilities.

    A subclass changes the scores before the loss's activation, the probabilities after it, or both. The two steps are
    what TorchScript compiles; what they need of the predictor or of class statistics, :meth:`prepare` gets.

    Class attributes:
        parameter: name of the constructor's argument that sets the strength; at 0 the model is as trained, bit for bit.
        uses_statistics: the constructor takes ``statistics`` and ``min_count``: the calibrator reads class statistics.
        uses_weights: the constructor takes ``weights``, the checkpoint beside which it finds what belongs to it.
        background_rules: values that ``background`` takes.
    """

    # Given by the config's common keys: no options of one calibrator.
    shared_arguments: Sequence[str] = ("statistics", "min_count", "weights")
    parameter: str = "tau"
    uses_statistics: bool = True
    uses_weights: bool = False
    background_rules: Sequence[str] = ("keep",)

    def __init__(self, value: float, background: str = "keep"):
        super().__init__()
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

    def check(self, predictor: Predictor) -> None:
        """Raise ``ValueError`` if this calibrator cannot work on the predictor's loss or classifier."""

    def prepare(self, predictor: Predictor) -> None:
        """Keep as tensors (no buffers: they would be rounded with the model) what the steps need. Called before them.

        Raises:
            ValueError: see :meth:`check`; or what is needed is missing.
        """

    def adjust_scores(self, scores: Tensor) -> Tensor:
        """``(R, num_outputs)`` scores before the activation."""
        return scores

    def adjust_probabilities(self, probs: Tensor) -> Tensor:
        """``(R, K + 1)`` probabilities after the activation, background last."""
        return probs

    @torch.jit.unused
    def forward(self, scores: Tensor, predictor: Predictor) -> Tensor:
        """
        Args:
            scores: ``(R, num_outputs)``, what ``predictor.cls_score`` gave.
            predictor: its loss says how scores become probabilities.

        Returns:
            ``(R, K + 1)`` probabilities, background last.
        """
        self.prepare(predictor)
        return self.adjust_probabilities(predictor.loss.activation(self.adjust_scores(scores)))

    def describe(self) -> str:
        """One line for the log."""
        return f"{type(self).__name__}: {self.parameter} {self.value:g}, background rule {self.background!r}"
