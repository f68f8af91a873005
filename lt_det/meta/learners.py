"""Learners of class rates: which classes of a batch should count more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LEARNERS", "ClassRateLearner", "MetaReweighter", "RoISampler", "build_learner"]


class ClassRateLearner(nn.Module):
    """Rates ``r_c = sigmoid(psi_c)`` of K classes, and what they make of a batch of RoIs.

    A learner turns the rates into weights of classes; a foreground RoI has its class's, background always 1.
    The weights of a batch's foreground RoIs sum to their number, so that the balance of foreground and
    background stays as it was.

    Attributes:
        logits: ``(K,)``, psi, zero at first: all rates 0.5.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"{type(self).__name__}: num_classes must be positive, got {num_classes}")
        self.num_classes = num_classes
        self.logits = nn.Parameter(torch.zeros(num_classes))

    @property
    def rates(self) -> Tensor:
        """``(K,)`` in (0, 1), without graph."""
        return self.logits.detach().sigmoid()

    def class_weights(self, counts: Tensor, *, generator: torch.Generator, applied: bool = False) -> Tensor:
        """Weights of the classes in a batch, with a graph to the logits.

        Args:
            counts: ``(K,)`` number of foreground RoIs of each class, over all ranks.
            generator: CPU random numbers, alike on all ranks.
            applied: the batch was already drawn by the rates (the image sampler): the weights then have the
                value of equal rates, and only their derivative is that of the rates.

        Returns:
            ``(K,)`` weights, with ``(counts * weights).sum() == counts.sum()``; 0 for classes that are not in
            the batch.
        """
        counts = counts.to(self.logits)
        rates = self.logits.sigmoid()
        if applied:
            rates = rates / rates.detach()
        return self._class_weights(counts, rates, generator)

    def _class_weights(self, counts: Tensor, rates: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class MetaReweighter(ClassRateLearner):
    """Rates are loss weights, rescaled to keep the sum over a batch's foreground RoIs: the form of BALMS's LVIS code.

    That code rescales by the foreground RoIs of each GPU, this by those of all of them, so that one process and several
    train alike. The meta loss differs too, see :class:`lt_det.meta.MetaStep`.
    """

    def _class_weights(self, counts: Tensor, rates: Tensor, generator: torch.Generator) -> Tensor:
        total = (counts * rates).sum()
        scale = counts.sum() / total.clamp_min(torch.finfo(rates.dtype).tiny)
        return torch.where(counts > 0, rates * scale, 0.0)


class RoISampler(ClassRateLearner):
    """Rates are sampling rates: a batch's foreground RoIs are drawn anew, with replacement, in proportion to them.

    In a config it is ``META.NAME`` "MetaSampler". (``lt_det.data.MetaSampler`` draws images.)

    As many draws as there are foreground RoIs, each of a class by Gumbel-softmax with the straight-through
    gradient (Ren et al., NeurIPS 2020): the draw is hard, its derivative that of the softmax over the perturbed logits.
    The RoIs of a class share its draws equally, which is the mean over which of them are drawn; that takes noise away,
    and does not depend on how the RoIs are spread over processes.

    Departures from the published classification code (that for LVIS has the reweighter alone):

    * There the rates draw images from the training set; here they draw RoIs from a batch that has been drawn already
      (the image sampler, ``SAMPLER_TRAIN`` "MetaSampler", draws images by the same rates). The logits of a draw are
      log(n_c r_c), with n_c RoIs of class c in the batch.
    * That code multiplies the straight-through sample by its own hard value, so that the derivative is 0 by what was
      not drawn; here it is the softmax's, drawn or not.

    Args:
        temperature: of the Gumbel-softmax.
    """

    def __init__(self, num_classes: int, *, temperature: float = 1.0):
        super().__init__(num_classes)
        if not temperature > 0:
            raise ValueError(f"RoISampler: the temperature must be positive, got {temperature}")
        self.temperature = temperature

    def _class_weights(self, counts: Tensor, rates: Tensor, generator: torch.Generator) -> Tensor:
        present = counts.nonzero().flatten()
        weights = torch.zeros_like(counts)
        if present.numel() == 0:
            return weights + 0.0 * rates.sum()
        n = counts[present]
        log_share = (n * rates[present]).log()
        # Gumbel noise of every class, drawn in a fixed order on the CPU.
        uniform = torch.rand(int(counts.sum()), present.numel(), generator=generator, dtype=torch.float64)
        noise = -(-uniform.clamp_(1e-12, 1 - 1e-12).log()).log()
        perturbed = (log_share + noise.to(log_share)) / self.temperature
        soft = perturbed.softmax(dim=1)
        hard = torch.zeros_like(soft).scatter_(1, perturbed.detach().argmax(dim=1, keepdim=True), 1.0)
        draws = (hard + soft - soft.detach()).sum(dim=0)
        return weights.index_put((present,), draws / n)


LEARNERS = {"MetaReweighter": MetaReweighter, "MetaSampler": RoISampler}


def build_learner(name: str, num_classes: int) -> ClassRateLearner:
    """A learner by name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in LEARNERS:
        raise ValueError(f'META.NAME is {name!r}; it must be one of {", ".join(LEARNERS)}, or "" for none')
    return LEARNERS[name](num_classes)
