"""LOCE: the equilibrium loss with a memory of features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, foreground_rows, mean_over_rows
from lt_det.losses.distributed import all_reduce_sum
from lt_det.losses.functional import add_vector
from lt_det.losses.kernels import adjusted_cross_entropy, compute_dtype
from lt_det.losses.queues import ClassQueues


@LOSS_REGISTRY.register()
class LOCE(ClassificationLoss):
    """LOCE: the equilibrium loss CE(z + log s, y) with s = running mean of each class's score, and a memory
    from which RoI features of classes with low scores are classified again.

    Feng et al., "Exploring Classification Equilibrium in Long-Tailed Object Detection", ICCV 2021. s_c is
    the exponential moving average of the softmax probability that foreground RoIs of class c get;
    background has a fixed s. It is updated by a batch before its loss, over all ranks, and kept in the
    checkpoint.

    Memory-augmented feature sampling: the memory holds the latest ``memory_size`` features of each class,
    those of all ranks, in bfloat16 and in the checkpoint (LVIS with 1024-d features: 197 MB). After a batch
    has been added, ``sampled_classes`` classes are drawn with replacement, with probability proportional to
    1 / s_c, and of each ``sampled_features`` features (none of a class that has none). They count as rows
    of their class in the loss, whose mean is over all rows, and in s. Their gradient reaches the classifier,
    not what made the features. The memory exists where a box predictor uses the loss, and in training mode
    alone.

    What differs from the published code: its average takes one step for each ground-truth object, here it
    takes one for each class in the batch (a loss does not know which RoIs share an object). It keeps pooled
    features of 16 jittered copies of each ground-truth box and sends them through the box head again, which
    its recipe has frozen; here the batch's foreground RoIs are kept as they enter the classifier, so train
    with the trunk frozen (``DECOUPLE``). Box regression is not trained on the memory. As there, one pass over the
    training images fills the memory and the mean scores before stage 2.

    Args:
        momentum: of the moving average.
        background_score: s of background.
        initial_score: s of every class before training.
        memory_size: features of each class; 0: no memory.
        sampled_classes: classes drawn from the memory for a batch, on each rank.
        sampled_features: features of each.
    """

    config_node = "LOCE"
    looks_first = True

    def __init__(
        self,
        num_classes: int,
        *,
        momentum: float = 0.9,
        background_score: float = 0.01,
        initial_score: float = 0.01,
        memory_size: int = 80,
        sampled_classes: int = 8,
        sampled_features: int = 4,
        **common,
    ):
        super().__init__(num_classes, **common)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"LOCE: momentum must lie in [0, 1), got {momentum}")
        if not (0.0 < background_score <= 1.0 and 0.0 < initial_score <= 1.0):
            raise ValueError(
                f"LOCE: scores must lie in (0, 1], got background_score {background_score}, initial_score"
                f" {initial_score}"
            )
        if memory_size < 0:
            raise ValueError(f"LOCE: memory_size must not be negative (0: no memory), got {memory_size}")
        if sampled_classes < 1 or sampled_features < 1:
            raise ValueError(
                "LOCE: sampled_classes and sampled_features must be positive (memory_size 0 turns sampling"
                f" off), got {sampled_classes} and {sampled_features}"
            )
        self.momentum = float(momentum)
        self.background_score = float(background_score)
        self.memory_size = int(memory_size)
        self.sampled_classes, self.sampled_features = int(sampled_classes), int(sampled_features)
        self.memory: ClassQueues | None = None
        self.register_buffer("mean_score", torch.full((num_classes,), float(initial_score)))

    def remember_features(self, width: int) -> None:
        if self.memory_size > 0:
            sizes = torch.full((self.num_classes,), self.memory_size)
            self.memory = ClassQueues(sizes, width, dtype=torch.bfloat16)
            self.wants_features = True

    def _replay(self, features, labels: Tensor, classify) -> tuple[Tensor, Tensor]:
        """Add the batch to the memory and draw from it: scores (N, K + 1) and their labels (N,).

        The label is background where a class without features was drawn: such rows are not to count.
        """
        if features is None and labels.numel() == 0:  # of no proposals
            features = self.memory.keys.new_zeros(0, self.memory.width)
        if features is None or classify is None:
            raise ValueError(
                "LOCE: with a memory, training needs features= (R, D) and classify= (the classifier); set"
                " MODEL.LONG_TAIL.LOCE.MEMORY_SIZE (memory_size) to 0 to train without"
            )
        memory = self.memory
        self._keep(features, labels)
        weights = 1.0 / (self.mean_score + 1e-7)
        classes = torch.multinomial(weights, self.sampled_classes, replacement=True)
        classes = classes.repeat_interleave(self.sampled_features)
        slots = (torch.rand(classes.shape, device=classes.device) * memory.filled[classes]).long()
        scores = classify(memory.keys[memory.offsets[classes] + slots].to(features.dtype))
        return scores, torch.where(memory.filled[classes] > 0, classes, self.num_classes)

    def _keep(self, features: Tensor, labels: Tensor) -> None:
        rows = (labels < self.num_classes).nonzero().squeeze(1)
        # The queues can tell the keys of a ground-truth box; nothing here asks for it.
        self.memory.insert(features.detach()[rows], labels[rows], torch.zeros_like(rows))

    def look_first(self, scores: Tensor, labels: Tensor, features: Tensor) -> None:
        if self.memory is not None:
            self._keep(features, labels)
        self._update([(scores.detach(), labels)])

    @torch.no_grad()
    def _update(self, batch: list[tuple[Tensor, Tensor]]) -> None:
        sums = torch.zeros(2, self.num_classes + 1, dtype=torch.float64, device=self.mean_score.device)
        for scores, labels in batch:
            rows = foreground_rows(labels, self.num_classes)
            own = labels[rows]
            probs = torch.exp(-adjusted_cross_entropy(scores[rows], own))
            sums[0].scatter_add_(0, own, probs.to(sums.dtype))
            sums[1].scatter_add_(0, own, torch.ones_like(own, dtype=sums.dtype))
        sums = all_reduce_sum(sums)[:, :-1]
        mean = (sums[0] / sums[1].clamp(min=1)).to(self.mean_score.dtype)
        self.mean_score.copy_(
            torch.where(sums[1] > 0, torch.lerp(mean, self.mean_score, self.momentum), self.mean_score)
        )

    def compute(
        self,
        scores: Tensor,
        labels: Tensor,
        roi_weights: Tensor | None,
        features: Tensor | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        batch = [(scores, labels)]
        if self.training:
            if self.memory is not None:
                batch.append(self._replay(features, labels, classify))
            self._update(batch)
        # A class whose every score underflows would get log 0.
        log_score = self.mean_score.clamp(min=1e-12).log()
        log_score = torch.cat([log_score, torch.full_like(log_score[:1], self.background_score).log()])
        adjust = add_vector(log_score.to(compute_dtype(scores.dtype)))
        loss = mean_over_rows(adjusted_cross_entropy(scores, labels, adjust=adjust), roi_weights, scores)
        for replayed, classes in batch[1:]:
            counted = classes < self.num_classes
            losses = torch.where(counted, adjusted_cross_entropy(replayed, classes, adjust=adjust), 0.0)
            loss = (loss * labels.numel() + losses.sum()) / (labels.numel() + counted.sum()).clamp(min=1)
        return loss

    def summary(self) -> str:
        memory = "no memory"
        if self.memory is not None:
            memory = (
                f"memory of {self.memory_size} features a class ({int((self.memory.filled > 0).sum())} of"
                f" {self.num_classes} classes have any, {self.memory.megabytes:.0f} MB),"
                f" {self.sampled_classes} classes times {self.sampled_features} features drawn a batch"
            )
        return (
            f"momentum {self.momentum:g}, mean scores now from {self.mean_score.min():.3g} to"
            f" {self.mean_score.max():.3g}, background score fixed at {self.background_score:g}, {memory}"
        )
