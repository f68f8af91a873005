"""The meta step of BALMS inside stage 2 of decoupled training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import get_event_storage
from torch import Tensor

from lt_det.losses import ClassificationLoss
from lt_det.losses.distributed import all_reduce_sum
from lt_det.losses.kernels import compute_dtype
from lt_det.modeling import DecoupledClassifier, RoIBatch, box_predictors

from .gradient import LookAhead, RowTerms, WeightedRows, classifier_form, row_terms, weight_gradients
from .learners import ClassRateLearner

__all__ = ["MetaDecoupledClassifier", "MetaStep", "check_rows"]


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return all_reduce_sum(tensor) / dist.get_world_size()
    return tensor


class MetaStep:
    """Learns class rates: one look-ahead of the classifier, its loss on a class-balanced batch, one step of
    Adam on the rates.

    Ren et al., NeurIPS 2020. All ranks take the same step: the look-ahead's gradient, the meta loss's gradient, and
    that of the rates are means over ranks.

    A departure from the published LVIS code: the meta loss is plain, as in the paper's equations. That code computes
    the balanced loss first, which shifts the foreground rows' logits in place, and then its "plain" sigmoid loss from
    the same tensor, so that its meta batches see the shift too. ``META.LOSS`` with the name of ``DECOUPLE.LOSS``
    (BalancedSigmoid for the published arm) gives that.

    Attributes:
        learner: the class rates.
        meta_loss: plain classification loss of the meta batch.
        period: iterations from one meta step to the next.
        balance_rois: the foreground RoIs of a meta batch count so that all classes in it have the same
            weight.
        applied: images are drawn by the rates already, so RoIs are not weighted by them again.
        iteration: number of iterations so far.
    """

    def __init__(
        self,
        learner: ClassRateLearner,
        meta_loss: ClassificationLoss,
        *,
        optimizer: torch.optim.Optimizer,
        open_batches: Callable[[int], Iterator[list[dict]]],
        lr: float = 0.01,
        period: int = 1,
        balance_rois: bool = False,
        applied: bool = False,
        seed: int = 0,
    ):
        """
        Args:
            optimizer: the classifier's; learner and loss move to its device.
            open_batches: from a number of meta batches to pass over to an iterator of those that follow, on this rank.
            lr: of Adam on the logits of the rates.
            seed: of the learner's random numbers; the same on all ranks.

        Raises:
            ValueError: for a period or learning rate that is not positive.
        """
        if period < 1:
            raise ValueError(f"META.PERIOD must be at least 1, got {period}")
        if not lr > 0:
            raise ValueError(f"META.LR must be positive, got {lr}")
        device = optimizer.param_groups[0]["params"][0].device
        self.learner = learner.to(device)
        self.meta_loss = meta_loss.to(device).eval()  # it looks, and must not count what it sees
        self.period = period
        self.balance_rois = balance_rois
        self.applied = applied
        self.seed = seed
        self.iteration = 0
        self._optimizer, self._open_batches = optimizer, open_batches
        self._batches: Iterator[list[dict]] | None = None
        self._adam = torch.optim.Adam(learner.parameters(), lr=lr)

    @property
    def due(self) -> bool:
        """Whether this iteration takes a meta step."""
        return self.iteration % self.period == 0

    def batches_before(self, iteration: int) -> int:
        """Number of meta batches that iterations before ``iteration`` (of stage 2) take."""
        return -(-iteration // self.period)

    def next_batch(self) -> list[dict]:
        """The meta batch of this iteration."""
        if self._batches is None:
            self._batches = self._open_batches(self.batches_before(self.iteration))
        return next(self._batches)

    def class_counts(self, rois: RoIBatch) -> Tensor:
        """``(K,)`` foreground RoIs of each class on all ranks."""
        labels = rois.gt_classes
        counts = labels.new_zeros(self.learner.num_classes + 1).scatter_add_(0, labels, torch.ones_like(labels))
        return all_reduce_sum(counts[: self.learner.num_classes])

    def step(self, train: list[RoIBatch], terms: list[RowTerms], counts: list[Tensor], meta: list[RoIBatch]) -> float:
        """One step of the rates.

        Args:
            train, meta: the classifiers' RoIs of the training batch and of the meta batch.
            terms: of the training batch at the present parameters, without weights.
            counts: of the training batch, from :meth:`class_counts`.

        Returns:
            The meta loss, mean over ranks.
        """
        generator = self._generator(0)
        num_classes = self.learner.num_classes
        objective, total = 0.0, 0.0
        for rois, rows, n, meta_rois in zip(train, terms, counts, meta):
            form = classifier_form(rois.predictor.cls_score)
            dtype = form.parameters["weight"].dtype
            with torch.enable_grad():
                class_weights = self.learner.class_weights(n, generator=generator, applied=self.applied)
            gradients, loss = weight_gradients(
                form,
                LookAhead(self._optimizer, form.parameters),
                rois.features.to(dtype),
                rows,
                _of_rows(class_weights.detach(), rois.gt_classes),
                meta_rois.features.to(dtype),
                partial(self._meta_loss, meta_rois),
                reduce=_mean_over_ranks,
            )
            by_class = gradients.new_zeros(num_classes + 1).index_add_(0, rois.gt_classes, gradients)[:num_classes]
            with torch.enable_grad():
                objective = objective + (class_weights * _mean_over_ranks(by_class)).sum()
            total = total + loss
        self._adam.zero_grad()
        objective.backward()
        self._adam.step()
        return float(_mean_over_ranks(total))

    def _meta_loss(self, rois: RoIBatch, scores: Tensor) -> Tensor:
        weights = None
        if self.balance_rois:
            counts = self.class_counts(rois)
            equal = counts.sum() / (counts.clamp_min(1) * (counts > 0).sum().clamp_min(1))
            weights = _of_rows(equal, rois.gt_classes)
        return self.meta_loss(scores, rois.gt_classes, roi_weights=weights)

    @torch.no_grad()
    def roi_weights(self, rois: list[RoIBatch], counts: list[Tensor]) -> list[Tensor]:
        """``(R,)`` weights of the training step's RoIs under the present rates, for each classifier."""
        if self.applied:
            return [r.features.new_ones(r.gt_classes.shape, dtype=torch.float32) for r in rois]
        generator = self._generator(1)
        return [
            _of_rows(self.learner.class_weights(n, generator=generator), r.gt_classes) for r, n in zip(rois, counts)
        ]

    def _generator(self, purpose: int) -> torch.Generator:
        """CPU random numbers that follow from the iteration alone, alike on all ranks."""
        words = np.random.SeedSequence((self.seed, self.iteration, purpose)).generate_state(2, np.uint32)
        generator = torch.Generator()
        generator.manual_seed((int(words[0]) << 31) ^ int(words[1]))
        return generator

    def state_dict(self) -> dict:
        return {
            "learner": self.learner.state_dict(),
            "adam": self._adam.state_dict(),
            "iteration": self.iteration,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state["learner"])
        self._adam.load_state_dict(state["adam"])
        self.iteration, self.seed = state["iteration"], state["seed"]
        self._batches = None  # opened anew at the one that is next


def _of_rows(class_weights: Tensor, labels: Tensor) -> Tensor:
    """``(R,)``: weights of the rows' classes, 1 for background (the last label)."""
    return torch.cat([class_weights, class_weights.new_ones(1)])[labels]


class MetaDecoupledClassifier(DecoupledClassifier):
    """Stage 2 with learned class rates. Each batch passes the trunk once; meta batches, every ``period`` iterations."""

    state_name = "meta"  # of training_state, in a checkpoint

    def __init__(self, detector: GeneralizedRCNN, meta: MetaStep):
        """
        Raises:
            ValueError: if a classifier has no closed form, or a loss does not split into rows.
        """
        super().__init__(detector)
        for predictor in box_predictors(detector):
            classifier_form(predictor.cls_score)
            check_rows(predictor.loss)
            predictor.check_fit(meta.meta_loss)
        self.meta = meta  # no nn.Module: its rates are neither the model's nor DistributedDataParallel's business

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        meta = self.meta
        rois = self.roi_batches(batched_inputs)
        scores = [r.predictor.cls_score(r.features) for r in rois]
        terms = [self._terms(r, z) for r, z in zip(rois, scores)]
        with torch.autocast(device_type=scores[0].device.type, enabled=False):
            counts = [meta.class_counts(r) for r in rois]
            if meta.due:
                get_event_storage().put_scalar("meta/loss", meta.step(rois, terms, counts, self._meta_batch()))
            weights = meta.roi_weights(rois, counts)
            losses = {
                "loss_cls" + r.suffix: WeightedRows.apply(z, t.losses, t.gradients, w)
                for r, z, t, w in zip(rois, scores, terms, weights)
            }
        meta.iteration += 1
        return losses

    def _meta_batch(self) -> list[RoIBatch]:
        # What Detectron2 logs of its sampled RoIs stays that of the training batch.
        with get_event_storage().name_scope("meta"):
            return self.roi_batches(self.meta.next_batch())

    def training_state(self) -> dict:
        """What a resumed run needs beside the detector."""
        return self.meta.state_dict()

    def load_training_state(self, state: dict) -> None:
        self.meta.load_state_dict(state)

    @staticmethod
    def _terms(rois: RoIBatch, scores: Tensor) -> RowTerms:
        def loss(z: Tensor, weights: Tensor) -> Tensor:
            return sum(rois.predictor.classification_losses(z, rois.gt_classes, roi_weights=weights).values())

        return row_terms(loss, scores.to(compute_dtype(scores.dtype)))


def check_rows(loss: ClassificationLoss) -> None:
    """Raise ``ValueError`` for a loss that has no row for each RoI, which rates could weight."""
    if loss.wants_features:
        raise ValueError(
            f"META.NAME: {type(loss).__name__} classifies features that it keeps, whose loss has no RoI of the batch "
            'to weight; choose another DECOUPLE.LOSS, META.NAME "", or for LOCE MODEL.LONG_TAIL.LOCE.MEMORY_SIZE 0'
        )
