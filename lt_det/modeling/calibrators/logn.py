"""LogN: logits normalised by their mean and deviation over training RoIs."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lt_det.io import write_json_atomically
from lt_det.losses.functional import as_float64, normalized_logits

from .base import CALIBRATOR_REGISTRY, Calibrator, Predictor

_FORMAT = "lt_det.LogitMoments"


@dataclass(frozen=True)
class LogitMoments:
    """Mean and standard deviation of a classifier's logits over training RoIs, background RoIs included.

    Attributes:
        mean, std: K floats each.
        rois: number of RoIs they are of.
        classifier: :func:`classifier_key` of the classifier; empty: not known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rois: int = 0
    classifier: str = ""


def classifier_key(classifier: nn.Module) -> str:
    """A hash of a classifier's weights, by which moments of other weights are told."""
    digest = hashlib.sha256()
    for name, tensor in classifier.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def moments_path(weights: str) -> str:
    """Where the moments of a checkpoint lie: ``model_final.pth``'s in ``model_final.logn.json`` beside it; nowhere
    (empty) for an address."""
    return "" if not weights or "://" in weights else os.path.splitext(weights)[0] + ".logn.json"


def write_moments(path: str | os.PathLike, moments: Sequence[LogitMoments]) -> None:
    """Write the moments of each classifier of a detector (one a cascade stage) as json, atomically."""
    write_json_atomically(path, {"format": _FORMAT, "version": 1, "stages": [asdict(m) for m in moments]})


def read_moments(path: str | os.PathLike) -> tuple[LogitMoments, ...]:
    """What :func:`write_moments` wrote.

    Raises:
        FileNotFoundError, ValueError: no such file, or another kind of file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"LogN: there is no file {str(path)!r}; tools/fit_logn.py takes the mean and deviation of a checkpoint's "
            "logits, and MODEL.LONG_TAIL.CALIBRATOR.MOMENTS (moments) names their file"
        )
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        return tuple(
            LogitMoments(tuple(s["mean"]), tuple(s["std"]), int(s["rois"]), s["classifier"]) for s in content["stages"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"LogN: {path} was not written by tools/fit_logn.py ({error})") from error


@CALIBRATOR_REGISTRY.register()
class LogN(Calibrator):
    """Logit normalisation, without class counts: z'_c = (z_c - (mu_c - min mu)) / sigma_c; background's score stays.

    Zhao et al., Logit Normalization for Long-tail Object Detection, IJCV 2024. mu_c and sigma_c are the mean and the
    standard deviation of class c's logit over training RoIs, each image once (the published code keeps running means
    over an epoch in which the model learns on). ``tools/fit_logn.py`` takes them of a checkpoint; an evaluation
    that finds none takes them itself.

    Args:
        amount: strength s: z'_c = (z_c - s (mu_c - min mu)) / sigma_c^s. 1 is as published, 0 as trained.
        moments: file of the means and deviations; empty: beside the checkpoint in ``MODEL.WEIGHTS``.
    """

    parameter = "amount"
    uses_statistics = False
    uses_weights = True

    def __init__(self, amount: float = 1.0, *, moments: str | Sequence[LogitMoments] = "", weights: str = ""):
        """
        Args:
            amount: see above.
            moments: a file, or what it holds: the moments of each cascade stage (one without a cascade).
            weights: the checkpoint beside which the moments lie.
        """
        super().__init__(amount)
        self.path = moments if isinstance(moments, str) else ""
        self._weights = weights
        self._moments = None if isinstance(moments, str) else tuple(moments)
        self._prepared: LogitMoments | None = None
        self.mean = self.std = torch.ones(0, dtype=torch.float64)

    def set_moments(self, moments: Sequence[LogitMoments]) -> None:
        """Use these moments from now on, those of each cascade stage (one without a cascade)."""
        self._moments = tuple(moments)

    def moments_of(self, predictor: Predictor) -> LogitMoments:
        """The moments of a box predictor's logits.

        Raises:
            FileNotFoundError, ValueError: there are none, or they are of another detector.
        """
        if self._moments is None:
            self._moments = read_moments(self.path or moments_path(self._weights))
        stages = len(self._moments)
        if stages > 1 and predictor.cascade_stage is None:
            raise ValueError(
                f"LogN: the moments are of a cascade of {stages} stages, and this box predictor does not know its "
                "stage; use LongTailCascadeROIHeads"
            )
        found = self._moments[min(predictor.cascade_stage or 0, stages - 1)]
        if (predictor.cascade_stage or 0) >= stages or len(found.std) != predictor.num_classes:
            raise ValueError(
                f"LogN: the moments are of {len(found.std)} classes and {stages} cascade stages, and the detector is "
                "of others; take them anew with tools/fit_logn.py"
            )
        return found

    def check(self, predictor: Predictor) -> None:
        if predictor.loss.wants_cosine:
            raise ValueError(
                f"LogN normalises logits, and {type(predictor.loss).__name__} scales its cosines later; set "
                "MODEL.LONG_TAIL.CALIBRATOR.NAME to LogitAdjustment or NorCal"
            )

    def prepare(self, predictor: Predictor) -> None:
        if self.value == 0:
            return
        self.check(predictor)
        moments, device = self.moments_of(predictor), predictor.cls_score.weight.device
        if moments is self._prepared and device == self.mean.device:
            return  # a copy from the host makes it wait for a GPU
        mean, std = self.value * as_float64(moments.mean), as_float64(moments.std) ** self.value
        if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
            raise ValueError(
                "LogN: a mean or a deviation of the logits is not finite, or a deviation is 0; take them anew with "
                "tools/fit_logn.py"
            )
        self._prepared, self.mean, self.std = moments, mean.to(device), std.to(device)

    def adjust_scores(self, scores: Tensor) -> Tensor:
        if self.value == 0:
            return scores
        return normalized_logits(scores, self.mean.to(scores.device), self.std.to(scores.device))

    def describe(self) -> str:
        return f"{type(self).__name__}: amount {self.value:g}"
