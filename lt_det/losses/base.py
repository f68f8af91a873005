"""What every classification loss of the box head shares: its contract, labels and class counts."""

# Annotations are no strings in this file: torch.jit reads those of a module's attributes.

import math
from collections.abc import Callable, Sequence

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from lt_det.declaration import declared_options
from lt_det.losses.counts import COUNT_SOURCES, class_counts

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """
Classification losses of the box head, by the name that ``MODEL.LONG_TAIL.LOSS`` takes. Each is a subclass
of :class:`ClassificationLoss`, called as ``loss_class(num_classes, statistics=..., prior=...,
background=..., **options)``.
"""

PRIOR_SOURCES = (*COUNT_SOURCES, "online")

# Checking the values of labels makes a GPU wait for its queue, so on an accelerator it is done only when
# debugging.
CHECK_LABELS_ON_DEVICE = False


class ClassificationLoss(nn.Module):
    """A classification loss over RoIs; owns all that depends on its form.

    Scores are (R, ``num_outputs(K)``); labels are int64 in [0, K], K = background. The loss is a mean over
    the R rows, as in Detectron2. Half-precision scores are computed in float32, with or without autocast. A
    NaN or an infinity in the scores makes the loss non-finite, which Detectron2's trainer reports with the
    iteration; nothing here hides it.

    Class attributes:
        config_node: name of the loss's node under ``MODEL.LONG_TAIL``; its keys are the upper-cased options.
        wants_cosine: scores are raw cosines, which the loss scales.
        wants_features: ``forward`` takes ``features=`` (R, D), the input of the classifier, and
            ``classify=``, the classifier itself; see :meth:`remember_features`.
        wants_keys: training needs the branch ``lt_det.gml.MutualInformation`` beside the detector, fed
            with the features of a teacher.
        prior_sources, background_rules: the settings that this loss knows.
        looks_first: before a stage of decoupled training, all training images pass through :meth:`look_first`.
        needs_statistics: the loss reads class statistics whatever the prior.
        needs_roi_shares: it also reads ``sampled_count`` there, the expected instance counts under the training
            sampler, where they are known.
        needs_iterations: it takes ``iterations=``, the length of the training, for what begins late in it.
        mutually_exclusive: the K + 1 probabilities of a row sum to one; False: each class is decided by
            itself, and its probability leaves room for no other. Calibrators go by it.
    """

    # Scripting compiles the activation alone, not properties.
    __jit_unused_properties__ = ["uses_statistics"]

    # Of all losses, and given by the config's common keys: no options of one.
    shared_arguments: Sequence[str] = ("statistics", "prior", "background", "min_count")
    config_node: str = ""
    wants_cosine: bool = False
    wants_features: bool = False
    wants_keys: bool = False
    looks_first: bool = False
    needs_statistics: bool = False
    needs_roi_shares: bool = False
    needs_iterations: bool = False
    mutually_exclusive: bool = True
    prior_sources: Sequence[str] = PRIOR_SOURCES
    background_rules: Sequence[str] = ("keep",)

    def __init__(
        self,
        num_classes: int,
        *,
        statistics=None,
        prior: str = "image_count",
        background: str = "keep",
        min_count: float = 0.0,
    ):
        """
        Args:
            num_classes: number of foreground classes, K.
            statistics: class statistics of the training set, with ``image_count`` (K,), ``instance_count``
                (K,), ``num_images`` and ``prior(source)`` (K,); or a callable without arguments that
                returns them, called when they are first needed. None for losses that need none.
            prior: source of the class prior: "image_count", "instance_count", "sampled" or "online".
            background: rule for the background, see :class:`lt_det.losses.PriorAdjustedLoss`.
            min_count: class counts below this are raised to it; 0 makes a class without training images an
                error.
        """
        super().__init__()
        name = type(self).__name__
        if num_classes < 1:
            raise ValueError(f"{name}: num_classes must be positive, got {num_classes}")
        if prior not in self.prior_sources:
            raise ValueError(
                f"{name}: MODEL.LONG_TAIL.PRIOR (prior) is {prior!r}; choose one of {', '.join(self.prior_sources)}"
            )
        if background not in self.background_rules:
            raise ValueError(
                f"{name}: MODEL.LONG_TAIL.BACKGROUND (background) is {background!r}; choose one of "
                f"{', '.join(self.background_rules)}"
            )
        self.num_classes = num_classes
        self.prior = prior
        self.background = background
        self.min_count = float(min_count)
        self._statistics = statistics
        self._prepared = False

    # What a loss defines.

    def num_outputs(self, num_classes: int) -> int:
        """Width of the classifier. Softmax: K + 1, background last."""
        return num_classes + 1

    def initial_bias(self, num_classes: int) -> Tensor:
        """(num_outputs,) bias with which the classifier starts."""
        return torch.zeros(self.num_outputs(num_classes))

    def activation(self, scores: Tensor) -> Tensor:
        """(R, num_outputs) scores to (R, K + 1) probabilities at inference, background last."""
        return scores.softmax(dim=1)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor | dict[str, Tensor]:
        """The loss; also called for R = 0, so that collective operations stay in step across ranks."""
        raise NotImplementedError

    def load_statistics(self, statistics) -> None:
        """Fill the buffers that depend on the class statistics. Called once, before the first use."""

    def remember_features(self, width: int) -> None:
        """Make room for features of the classifier's input, (R, ``width``), if the loss keeps any.

        The box predictor calls it for its loss, once, before a checkpoint is loaded. A loss that keeps
        features sets ``wants_features`` here: called without a box predictor, it does without them.
        """

    def look_first(self, scores: Tensor, labels: Tensor, features: Tensor) -> None:
        """Take note of RoIs before training, without a loss; on all ranks together, R = 0 included.

        Args:
            scores, labels: as :meth:`forward` has them.
            features: (R, D), what the classifier made the scores from.
        """

    def summary(self) -> str:
        """The part of :meth:`describe` that is the loss's own."""
        return ""

    # What all losses share.

    @torch.jit.unused
    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        roi_weights: Tensor | None = None,
        features: Tensor | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """
        Args:
            scores: (R, num_outputs) float16, bfloat16, float32 or float64.
            labels: (R,) int64 in [0, K], K = background.
            roi_weights: optional (R,) weights, multiplied to the rows' losses; the mean still divides by R.
            features: (R, D), what the classifier made the scores from; for losses with ``wants_features``,
                ignored by others.
            classify: the classifier, (N, D) features to (N, num_outputs) scores with gradients for its
                parameters; for the same losses.

        Returns:
            A scalar, or a dict of scalars for a loss with several parts.

        Raises:
            ValueError: if shapes disagree (no scores may have any width), or (on the CPU) labels are out of range.
        """
        if scores.dim() == 2 and len(scores) == 0 and scores.shape[1] not in self.accepted_widths():
            # Detectron2 asks nothing of the width of no scores.
            connected, scores = scores.sum() * 0.0, scores.new_zeros(0, self.num_outputs(self.num_classes))
            value = self(scores, labels, roi_weights=roi_weights, features=features, classify=classify)
            if isinstance(value, dict):
                return {name: part + connected for name, part in value.items()}
            return value + connected
        labels = self._checked_labels(scores, labels, roi_weights)
        self.prepare()
        with torch.autocast(device_type=scores.device.type, enabled=False):
            if self.wants_features:
                return self.compute(scores, labels, roi_weights, features=features, classify=classify)
            return self.compute(scores, labels, roi_weights)

    def prepare(self) -> None:
        """Resolve the class statistics now rather than at the first batch.

        Raises:
            ValueError: if they are missing, or do not fit the number of classes.
        """
        if self._prepared:
            return
        if self.uses_statistics:
            self.load_statistics(self.class_statistics())
        self._prepared = True

    def describe(self) -> str:
        """One line for the log: the loss, and where it has them its options, background rule and prior."""
        self.prepare()
        summary = self.summary()
        return type(self).__name__ + (f": {summary}" if summary else "")

    @property
    def uses_statistics(self) -> bool:
        return self.needs_statistics

    def class_statistics(self):
        """The class statistics, resolved. No property: exporting a model would read it, and need the training set."""
        if self._statistics is None:
            raise ValueError(
                f"{type(self).__name__} needs class statistics: pass statistics=ClassStatistics(...), or set"
                " DATASETS.TRAIN or MODEL.LONG_TAIL.STATISTICS"
            )
        if callable(self._statistics):
            self._statistics = self._statistics()
        return self._statistics

    def class_counts(self, source: str | None = None, *, allow_zero: bool = False) -> Tensor:
        """(K,) float64 counts by ``source`` (default: the loss's prior source), raised to ``min_count``.

        Raises:
            ValueError: see :func:`lt_det.losses.counts.class_counts`.
        """
        counts = class_counts(
            self.class_statistics(),
            source or self.prior,
            num_classes=self.num_classes,
            min_count=self.min_count,
            allow_zero=allow_zero,
            wanted_by=type(self).__name__,
        )
        return torch.from_numpy(counts)

    @classmethod
    def options(cls) -> dict[str, object]:
        """The loss's own options and their defaults; its config node has them in upper case."""
        return {option.name: option.default for option in declared_options(cls)}

    def _checked_labels(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        name = type(self).__name__
        if scores.dim() != 2 or scores.shape[1] not in self.accepted_widths():
            raise ValueError(
                f"{name}: scores must have shape (R, {self.num_outputs(self.num_classes)}), got {tuple(scores.shape)}"
            )
        if labels.shape != (scores.shape[0],):
            raise ValueError(f"{name}: labels must have shape ({scores.shape[0]},), got {tuple(labels.shape)}")
        if roi_weights is not None and roi_weights.shape != labels.shape:
            raise ValueError(
                f"{name}: roi_weights must have shape {tuple(labels.shape)}, got {tuple(roi_weights.shape)}"
            )
        if labels.numel() == 0:
            return labels.to(torch.int64)  # Detectron2 makes the labels of no proposals as float
        if labels.dtype != torch.int64:
            raise ValueError(f"{name}: labels must be int64, got {labels.dtype}")
        if CHECK_LABELS_ON_DEVICE or labels.device.type == "cpu":
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"{name}: labels must lie in [0, {self.num_classes}] ({self.num_classes} = background),"
                    f" got values from {low} to {high}"
                )
        return labels

    def accepted_widths(self) -> tuple[int, ...]:
        return (self.num_outputs(self.num_classes),)


def mean_over_rows(losses: Tensor, roi_weights: Tensor | None, scores: Tensor) -> Tensor:
    """Mean over R of (R,) losses times optional (R,) weights; for R = 0 a zero with a gradient."""
    if losses.numel() == 0:
        return scores.to(losses.dtype).sum() * 0.0
    if roi_weights is not None:
        losses = losses * roi_weights.to(losses.dtype)
    return losses.sum() / losses.numel()


def reading_waits(tensor: Tensor) -> bool:
    """Whether the host would have to wait for a device to know a value or a number of values of ``tensor``."""
    return tensor.device.type != "cpu"


def foreground_rows(labels: Tensor, num_classes: int) -> Tensor:
    """(F,) rows with a label below ``num_classes``; all rows where their number would have to be waited for.

    So callers leave the others out by their labels.
    """
    if reading_waits(labels):
        return torch.arange(labels.numel(), device=labels.device)
    return (labels < num_classes).nonzero().squeeze(1)


def random_rows(candidates: Tensor, number: Tensor) -> Tensor:
    """(R,) bool: ``number`` of the rows that ``candidates`` (R,) marks, drawn at random without a sync."""
    order = torch.randperm(candidates.numel(), device=candidates.device)
    shuffled = candidates[order]
    chosen = torch.empty_like(candidates)
    chosen[order] = shuffled & (shuffled.cumsum(0) <= number)
    return chosen


def bias_for_probability(probability: float) -> float:
    """The bias at which a sigmoid gives ``probability``; 0 for 0, meaning no bias prior."""
    if probability == 0:
        return 0.0
    if not 0 < probability < 1:
        raise ValueError(f"bias_prior must lie in [0, 1) (0: no bias), got {probability}")
    return math.log(probability / (1 - probability))
