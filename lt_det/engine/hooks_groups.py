"""How rare, common and frequent classes fare while training."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from lt_det.frequency import GROUP_NAMES
from lt_det.modeling import LongTailOutputLayers

__all__ = ["GroupScalars", "group_scalars"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def group_scalars(probabilities: Tensor, labels: Tensor, group: Tensor) -> dict[str, float]:
    """Accuracy among foreground classes, and mean probability of the label, over the foreground RoIs of each group.

    Args:
        probabilities: ``(R, K + 1)``, background last.
        labels: ``(R,)`` int64 in [0, K].
        group: ``(K,)`` int64, 0, 1, 2 for rare, common, frequent.

    Returns:
        ``accuracy_<group>`` and ``score_<group>``, for groups that have a RoI.
    """
    k = group.shape[0]
    foreground = labels < k
    labels, probabilities = labels[foreground], probabilities[foreground]
    hit = probabilities[:, :k].argmax(dim=1) == labels
    score = probabilities.gather(1, labels[:, None])[:, 0]
    of = group[labels]
    # One transfer from the device for all.
    rows = torch.stack(
        [torch.bincount(of, weights=w.double(), minlength=3) for w in (torch.ones_like(score), hit, score)]
    )
    out = {}
    for name, (count, hits, scores) in zip(GROUP_NAMES.values(), rows.T.tolist()):
        if count:
            out[f"accuracy_{name}"], out[f"score_{name}"] = hits / count, scores / count
    return out


class GroupScalars(HookBase):
    """TensorBoard scalars by frequency group, from the RoIs of one iteration in ``period`` (of this rank).

    ``groups/accuracy_<group>``: foreground RoIs whose class is the best of the foreground classes.
    ``groups/score_<group>``: mean probability of the label.
    ``groups/prior_<group>``: share of the group in the prior in use, for losses that have one (it moves with the
    "online" prior, and between stages).

    In a cascade they are the last stage's.
    """

    def __init__(self, model: Callable[[], nn.Module], groups: Callable[[], dict], period: int = 20):
        """
        Args:
            model: gives the detector in training.
            groups: gives class indices by group, as ``ClassStatistics.frequency_groups``. Called once.
            period: iterations from one point to the next.
        """
        self._model, self._period = model, period
        self._groups: Callable[[], dict] | None = groups
        self._group: Tensor | None = None
        self._handle = None
        self._found: dict[str, float] = {}

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self._period or not comm.is_main_process() or not self._known():
            return
        predictors = [m for m in self._model().modules() if isinstance(m, LongTailOutputLayers)]
        if predictors:
            self._handle = predictors[-1].loss.register_forward_hook(self._see, with_kwargs=True)

    def _known(self) -> bool:
        """Read the groups once; a training set without counts has none, and no scalars."""
        if self._groups is not None:
            try:
                groups = self._groups()
                self._group = torch.zeros(sum(map(len, groups.values())), dtype=torch.int64)
                for index, letter in enumerate(GROUP_NAMES):
                    self._group[torch.as_tensor(groups[letter], dtype=torch.int64)] = index
            except (OSError, ValueError) as error:
                logger.info("No scalars by frequency group: %s", error)
            self._groups = None
        return self._group is not None

    def _see(self, loss, args, kwargs, output) -> None:
        scores, labels = args[:2]
        self._group = self._group.to(labels.device)
        with torch.no_grad():
            probabilities = loss.activation(scores.detach().float())
            self._found = group_scalars(probabilities, labels, self._group)
            adjustment = getattr(loss, "adjustment", None)
            if callable(adjustment) and getattr(loss, "tau", 0):
                # a_c = tau log(K pi_c) + a constant
                prior = (adjustment()[: loss.num_classes].double() / loss.tau).softmax(dim=0)
                shares = torch.bincount(self._group, weights=prior, minlength=3).tolist()
                self._found.update({f"prior_{name}": share for name, share in zip(GROUP_NAMES.values(), shares)})

    def after_step(self) -> None:
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        for name, value in self._found.items():
            self.trainer.storage.put_scalar(f"groups/{name}", value, smoothing_hint=False)
        self._found = {}
