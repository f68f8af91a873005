"""Long-tail classification losses as functions: plain classification over C classes, no background. Calibrators of
trained models, at the end, say what their columns are.

Common arguments: ``logits`` (R, C) floating point; ``labels`` (R,) int64 in [0, C); ``class_counts`` (C,)
positive numbers (tensor, array or list; only their ratios matter); ``weight`` (C,) class weights, with
which the mean is the weighted mean of ``F.cross_entropy`` (divided by the sum of the labels' weights);
``reduction`` "mean", "sum" or "none". Float16 and bfloat16 logits are computed in float32, float64 in
float64. An empty batch gives a zero that has a gradient.

All functions raise ``ValueError`` for shapes that disagree, labels out of range and counts that are not
positive. NaN and infinite logits are not checked: they give a non-finite loss, which Detectron2's trainer
reports.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lt_det.losses.kernels import (
    NegativeWeight,
    adjusted_cross_entropy,
    binary_cross_entropy,
    compute_dtype,
    mixture_cross_entropy,
    rowwise_loss,
    weights_of_negatives,
)

__all__ = [
    "balanced_sigmoid_loss",
    "balanced_softmax_loss",
    "effective_number_weights",
    "fracal_probabilities",
    "gaussian_mixture_likelihood_loss",
    "gumbel_sigmoid_loss",
    "ldam_loss",
    "ldam_margins",
    "logit_adjusted_loss",
    "logit_adjustment",
    "logit_normalization",
    "pairwise_class_balance_loss",
    "pairwise_margin_loss",
    "seesaw_loss",
]


def as_float64(values, device=None) -> Tensor:
    """A tensor, array or list as a float64 tensor."""
    if not isinstance(values, Tensor):
        values = np.array(values, dtype=np.float64)  # a copy: arrays may be read-only
    return torch.as_tensor(values, dtype=torch.float64, device=device)


def as_positive_vector(values, name: str, size: int | None = None, device=None) -> Tensor:
    """``values`` as a float64 vector; ``ValueError`` unless it has ``size`` finite positive entries."""
    vector = as_float64(values, device)
    if vector.dim() != 1 or vector.numel() == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {tuple(vector.shape)}")
    if size is not None and vector.numel() != size:
        raise ValueError(f"{name} has {vector.numel()} entries, but there are {size} classes")
    good = torch.isfinite(vector) & (vector > 0)
    if not good.all():
        indices = (~good).nonzero().flatten().tolist()
        shown = ", ".join(f"{i} ({vector[i].item():g})" for i in indices[:10])
        more = f" and {len(indices) - 10} more" if len(indices) > 10 else ""
        raise ValueError(f"{name} must be positive and finite; offending classes: {shown}{more}")
    return vector


def log_relative_prior(class_counts: Tensor) -> Tensor:
    """log(C pi_c) of (C,) positive counts: 0 for uniform counts, unchanged when all counts are scaled."""
    return class_counts.log() - class_counts.mean().log()


def _check_logits(logits: Tensor, name: str = "logits") -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"{name} must be floating point of shape (R, C), got {logits.dtype} {tuple(logits.shape)}")


def _check_labels(labels: Tensor, num_rows: int, num_labels: int, name: str = "labels") -> None:
    if labels.shape != (num_rows,):
        raise ValueError(f"{name} must have shape ({num_rows},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {labels.dtype}")
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_labels):
        raise ValueError(
            f"{name} must lie in [0, {num_labels}), got values from {labels.min().item()} to {labels.max().item()}"
        )


def _class_weights(weight, logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=compute_dtype(logits.dtype), device=logits.device)
    if weight.shape != (logits.shape[1],):
        raise ValueError(f"weight must have shape ({logits.shape[1]},), got {tuple(weight.shape)}")
    return weight


def _reduce(losses: Tensor, reduction: str, label_weights: Tensor | None = None) -> Tensor:
    """Reduces (R,) losses as ``F.cross_entropy`` does, but with 0 for the mean of nothing."""
    if label_weights is not None:
        losses = losses * label_weights
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum" or losses.numel() == 0:
        return total
    if reduction == "mean":
        return total / (losses.numel() if label_weights is None else label_weights.sum())
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def add_vector(vector: Tensor):
    """An ``adjust`` of :func:`adjusted_cross_entropy`: adds a (C,) vector to every row."""

    def adjust(z: Tensor, rows: slice) -> None:
        z.add_(vector)

    return adjust


def add_rows(matrix: Tensor, index: Tensor):
    """An ``adjust`` of :func:`adjusted_cross_entropy`: adds row ``index[r]`` of (M, C) to row r."""

    def adjust(z: Tensor, rows: slice) -> None:
        z.add_(matrix.index_select(0, index[rows]))

    return adjust


def subtract_target_margin(margins: Tensor, labels: Tensor):
    """An ``adjust`` of :func:`adjusted_cross_entropy`: subtracts ``margins[y]`` from the label's logit."""

    def adjust(z: Tensor, rows: slice) -> None:
        y = labels[rows]
        z.scatter_add_(1, y[:, None], -margins[y][:, None])

    return adjust


def logit_adjusted_loss(
    logits: Tensor, labels: Tensor, class_counts, *, tau: float = 1.0, weight=None, reduction: str = "mean"
) -> Tensor:
    """Logit-adjusted softmax cross entropy: CE(z + tau log pi, y), pi = counts / sum.

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.
    """
    _check_reduction(reduction)
    _check_logits(logits)
    _check_labels(labels, *logits.shape)
    counts = as_positive_vector(class_counts, "class_counts", logits.shape[1], logits.device)
    adjustment = (tau * log_relative_prior(counts)).to(compute_dtype(logits.dtype))
    weight = _class_weights(weight, logits)
    losses = adjusted_cross_entropy(logits, labels, adjust=add_vector(adjustment))
    return _reduce(losses, reduction, None if weight is None else weight[labels])


def balanced_softmax_loss(
    logits: Tensor, labels: Tensor, class_counts, *, weight=None, reduction: str = "mean"
) -> Tensor:
    """Balanced Softmax: -log(n_y exp(z_y) / sum_c n_c exp(z_c)).

    Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. 4. Equal to
    :func:`logit_adjusted_loss` with tau = 1.
    """
    return logit_adjusted_loss(logits, labels, class_counts, tau=1.0, weight=weight, reduction=reduction)


def pairwise_margin_loss(logits: Tensor, labels: Tensor, alpha, delta, *, reduction: str = "mean") -> Tensor:
    """Pairwise margin loss: alpha_y log(1 + sum_{c != y} exp(delta_{y,c} + z_c - z_y)).

    Menon et al., ICLR 2021, eq. 11. The mean is over the rows (not divided by the sum of alpha).

    Args:
        alpha: (C,) weights of the label's class.
        delta: (C, C) margins, row = label; the diagonal is not used.
    """
    _check_reduction(reduction)
    _check_logits(logits)
    _check_labels(labels, *logits.shape)
    dtype, num_classes = compute_dtype(logits.dtype), logits.shape[1]
    alpha = torch.as_tensor(alpha, dtype=dtype, device=logits.device)
    delta = torch.as_tensor(delta, dtype=dtype, device=logits.device)
    if alpha.shape != (num_classes,):
        raise ValueError(f"alpha must have shape ({num_classes},), got {tuple(alpha.shape)}")
    if delta.shape != (num_classes, num_classes):
        raise ValueError(f"delta must have shape ({num_classes}, {num_classes}), got {tuple(delta.shape)}")
    delta = delta.clone().fill_diagonal_(0.0)
    losses = adjusted_cross_entropy(logits, labels, adjust=add_rows(delta, labels))
    return _reduce(losses * alpha[labels], reduction)


def ldam_margins(class_counts, max_margin: float = 0.5) -> Tensor:
    """LDAM's margins, n_c^(-1/4) scaled so that the largest is ``max_margin``; float64 (C,).

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.
    """
    counts = as_positive_vector(class_counts, "class_counts")
    margins = counts.pow(-0.25)
    return margins * (max_margin / margins.max())


def ldam_rows(cosine: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """(R,) losses of :func:`ldam_loss`; ``margins`` (C,) in the dtype that is computed in."""
    return adjusted_cross_entropy(cosine, labels, scale=scale, adjust=subtract_target_margin(scale * margins, labels))


def ldam_loss(
    cosine: Tensor, labels: Tensor, margins, *, scale: float = 30.0, weight=None, reduction: str = "mean"
) -> Tensor:
    """LDAM: CE(scale (cos - m_y onehot_y), y), with the weighted mean of ``F.cross_entropy``.

    Cao et al., NeurIPS 2019, with normalised features and class vectors.

    Args:
        cosine: (R, C) cosines between features and class vectors.
        margins: (C,), as :func:`ldam_margins` gives.
    """
    _check_reduction(reduction)
    _check_logits(cosine, "cosine")
    _check_labels(labels, *cosine.shape)
    margins = torch.as_tensor(margins, dtype=compute_dtype(cosine.dtype), device=cosine.device)
    if margins.shape != (cosine.shape[1],):
        raise ValueError(f"margins must have shape ({cosine.shape[1]},), got {tuple(margins.shape)}")
    weight = _class_weights(weight, cosine)
    losses = ldam_rows(cosine, labels, margins, scale)
    return _reduce(losses, reduction, None if weight is None else weight[labels])


def effective_number_weights(class_counts, beta: float = 0.9999) -> Tensor:
    """Class weights (1 - beta) / (1 - beta^n_c), normalised to sum to C; float64 (C,).

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.
    """
    counts = as_positive_vector(class_counts, "class_counts")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    if beta == 0.0:
        return torch.ones_like(counts)
    # 1 - beta^n = -expm1(n log beta) keeps its digits where beta^n is next to 1; (1 - beta) cancels.
    weights = -1.0 / torch.expm1(counts * torch.log(torch.tensor(beta, dtype=torch.float64, device=counts.device)))
    return weights * (counts.numel() / weights.sum())


def balanced_sigmoid_rows(logits: Tensor, labels: Tensor, log_odds: Tensor) -> Tensor:
    """(R,) losses of :func:`balanced_sigmoid_loss`; ``log_odds`` (C,) is log((1 - f) / f)."""

    def adjust(z: Tensor, rows: slice) -> None:
        foreground = (labels[rows] < logits.shape[1]).to(z.dtype)[:, None]
        z.addcmul_(foreground, log_odds.to(z.dtype), value=-1.0)

    return binary_cross_entropy(logits, labels, adjust=adjust)


def balanced_sigmoid_loss(logits: Tensor, labels: Tensor, class_frequencies) -> Tensor:
    """Balanced sigmoid, the form in which BALMS was trained on LVIS: BCE(z - log((1 - f) / f)).

    Foreground rows are shifted, background rows (label C) are not. Sum over classes, mean over rows. Ren et
    al., NeurIPS 2020; this form is the one of their published detection code.

    Args:
        labels: (R,) int64 in [0, C]; C is background.
        class_frequencies: (C,) fractions of training images with the class, in (0, 1).
    """
    _check_logits(logits)
    _check_labels(labels, logits.shape[0], logits.shape[1] + 1)
    f = as_positive_vector(class_frequencies, "class_frequencies", logits.shape[1], logits.device)
    if (f >= 1).any():
        raise ValueError(f"class_frequencies must be below 1, got {f.max().item():g}")
    log_odds = (torch.log1p(-f) - f.log()).to(compute_dtype(logits.dtype))
    return balanced_sigmoid_rows(logits, labels, log_odds).sum() / max(1, logits.shape[0])


# The published code's: logits are clamped to the range, each element of the binary cross entropy to the maximum.
GUMBEL_RANGE = (-4.0, 10.0)
GUMBEL_MAX_LOSS = 20.0


def gumbel_sigmoid_rows(logits: Tensor, labels: Tensor, *, negative_weight: NegativeWeight = None) -> Tensor:
    """(R,) losses of :func:`gumbel_sigmoid_loss`; ``negative_weight`` as in ``kernels.binary_cross_entropy``."""
    low, high = GUMBEL_RANGE
    num_classes = logits.shape[1]
    index = labels.clamp(max=num_classes - 1)[:, None]
    is_class = (labels < num_classes)[:, None]

    def negatives(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u = exp(-z), 1 - p = 1 - exp(-u), and a negative's loss -log(1 - p)."""
        u = z.clamp(low, high).neg().exp()
        rest = torch.expm1(-u).neg()
        # Of a loss next to 0 this keeps the digits that its sum with losses of about 1 has.
        return u, rest, rest.log().neg().clamp(max=GUMBEL_MAX_LOSS)

    def function(z: Tensor, rows: slice, gradient: Tensor | None) -> Tensor:
        i, own = index[rows], is_class[rows]
        u, rest, loss = negatives(z)
        weight = weights_of_negatives(negative_weight, z, rows)
        if weight is not None:
            loss.mul_(weight)
        u_own = u.gather(1, i)  # -log p, a positive's loss
        loss.scatter_(1, i, torch.where(own, u_own.clamp(max=GUMBEL_MAX_LOSS), loss.gather(1, i)))
        if gradient is not None:
            # d u / dz = -u; d(-log(1 - exp(-u))) / dz = u exp(-u) / (1 - exp(-u)), never clamped: at most 10.
            slope = torch.exp(-u, out=gradient).mul_(u).div_(rest)
            if weight is not None:
                slope.mul_(weight)
            slope_own = -u_own * (u_own <= GUMBEL_MAX_LOSS)
            slope.scatter_(1, i, torch.where(own, slope_own, slope.gather(1, i)))
            slope.mul_(z.clamp(low, high).sub_(z).eq_(0))  # what is clamped has no gradient
        # The clamps would hide an infinity: its product with 0 is NaN.
        return loss.add_(z, alpha=0).sum(dim=1)

    def plain(z: Tensor) -> Tensor:
        weight = weights_of_negatives(negative_weight, z.detach(), slice(0, z.shape[0]))
        u, _, loss = negatives(z)
        if weight is not None:
            loss = loss * weight
        own = torch.where(is_class, u.gather(1, index).clamp(max=GUMBEL_MAX_LOSS), loss.gather(1, index))
        return loss.scatter(1, index, own).sum(dim=1)

    return rowwise_loss(logits, function, plain, keep_gradient=True)


def gumbel_sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Gumbel sigmoid: binary cross entropy of p = exp(-exp(-z)), z clamped to [-4, 10], each element at most 20.

    Sum over classes, mean over rows. Alexandridis et al., "Long-tailed Instance Segmentation using Gumbel Optimized
    Loss", ECCV 2022, with the clamps of their published code. What is clamped has no gradient.

    Args:
        logits: (R, C).
        labels: (R,) int64 in [0, C]; C is background, where all classes are negatives.
    """
    _check_logits(logits)
    _check_labels(labels, logits.shape[0], logits.shape[1] + 1)
    return gumbel_sigmoid_rows(logits, labels).sum() / max(1, logits.shape[0])


def seesaw_adjustment(labels: Tensor, log_counts: Tensor, *, p: float, q: float, eps: float):
    """An ``adjust`` of :func:`adjusted_cross_entropy`: adds log S_{y,c} of :func:`seesaw_loss`.

    Args:
        log_counts: (C,) log(max(N, 1)).
    """
    floor = torch.log(torch.tensor(eps, dtype=log_counts.dtype)).item()

    def adjust(z: Tensor, rows: slice) -> None:
        y = labels[rows, None]
        shift = None
        if q > 0:  # log compensation: q log max(1, sigma_c / max(sigma_y, eps))
            log_probs = F.log_softmax(z, dim=1)
            shift = log_probs.sub_(log_probs.gather(1, y).clamp_(min=floor)).clamp_(min=0.0).mul_(q)
        if p > 0:  # log mitigation: p log min(1, N_c / N_y)
            mitigation = (log_counts - log_counts[y]).clamp_(max=0.0)
            shift = mitigation.mul_(p) if shift is None else shift.add_(mitigation, alpha=p)
        if shift is not None:
            z.add_(shift.scatter_(1, y, 0.0))

    return adjust


def seesaw_rows(logits: Tensor, labels: Tensor, log_counts: Tensor, *, p: float, q: float, eps: float) -> Tensor:
    """(R,) losses of :func:`seesaw_loss` with ``log_counts`` = log(max(N, 1)), (C,), precomputed."""
    return adjusted_cross_entropy(logits, labels, adjust=seesaw_adjustment(labels, log_counts, p=p, q=q, eps=eps))


def seesaw_loss(
    logits: Tensor,
    labels: Tensor,
    accumulated_counts,
    *,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
    reduction: str = "mean",
) -> Tensor:
    """Seesaw loss: CE with the negative classes' exponentials weighted by mitigation times compensation.

    S_{y,c} = min(1, (N_c / N_y)^p) * max(1, (sigma_c / max(sigma_y, eps))^q), a constant for the gradient.
    Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021.

    Args:
        accumulated_counts: (C,) instances seen so far, non-negative; below 1 counts as 1.
        p, q: exponents of mitigation and compensation; 0 switches either off.
        eps: lower bound of sigma_y in the compensation.
    """
    _check_reduction(reduction)
    _check_logits(logits)
    _check_labels(labels, *logits.shape)
    if p < 0 or q < 0 or eps <= 0:
        raise ValueError(f"p and q must be >= 0 and eps > 0, got p={p}, q={q}, eps={eps}")
    counts = torch.as_tensor(accumulated_counts, dtype=compute_dtype(logits.dtype), device=logits.device)
    if counts.shape != (logits.shape[1],):
        raise ValueError(f"accumulated_counts must have shape ({logits.shape[1]},), got {tuple(counts.shape)}")
    if not (torch.isfinite(counts) & (counts >= 0)).all():
        raise ValueError("accumulated_counts must be finite and not negative")
    losses = seesaw_rows(logits, labels, counts.clamp(min=1.0).log(), p=p, q=q, eps=eps)
    return _reduce(losses, reduction)


def pairwise_class_balance_rows(log_probs: Tensor, labels: Tensor, confusion: Tensor, alpha: float) -> Tensor:
    """(R,) losses of :func:`pairwise_class_balance_loss` from log-probabilities (R, C or more).

    Columns beyond the C of ``confusion`` (background) have a share of 0 in the soft labels.
    """
    soft = confusion[:, labels].T.to(log_probs.dtype)
    # A label that nothing has been taken for, which only an evaluation can have, has no soft label.
    soft = soft / soft.sum(dim=1, keepdim=True).clamp(min=torch.finfo(soft.dtype).tiny)
    own = log_probs.gather(1, labels[:, None]).squeeze(1)
    divergence = torch.xlogy(soft, soft).sum(dim=1) - (soft * log_probs[:, : soft.shape[1]]).sum(dim=1)
    return alpha * divergence - (1 - alpha) * own


def pairwise_class_balance_loss(
    logits: Tensor, labels: Tensor, confusion, *, alpha: float = 0.4, reduction: str = "mean"
) -> Tensor:
    """Pairwise class balance: (1 - alpha) CE(z, y) + alpha KL(t_y || softmax(z)), t_y column y of the confusion matrix.

    t_y(c) = M_{c,y} / sum_k M_{k,y}: the share of class c among what is taken for y, if all classes are equally
    frequent. A class whose objects go over to others is given back as much. He et al., "Relieving Long-tailed Instance
    Segmentation via Pairwise Class Balance", CVPR 2022.

    Args:
        confusion: (C, C) M, not negative, row = label, column = prediction; its diagonal is positive.
        alpha: in [0, 1].
    """
    _check_reduction(reduction)
    _check_logits(logits)
    _check_labels(labels, *logits.shape)
    dtype, num_classes = compute_dtype(logits.dtype), logits.shape[1]
    confusion = torch.as_tensor(confusion, dtype=dtype, device=logits.device)
    if confusion.shape != (num_classes, num_classes):
        raise ValueError(f"confusion must have shape ({num_classes}, {num_classes}), got {tuple(confusion.shape)}")
    if not (torch.isfinite(confusion).all() and (confusion >= 0).all() and (confusion.diagonal() > 0).all()):
        raise ValueError("confusion must be finite and not negative, with a positive diagonal")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    log_probs = F.log_softmax(logits.to(dtype), dim=1)
    return _reduce(pairwise_class_balance_rows(log_probs, labels, confusion, alpha), reduction)


def gaussian_mixture_likelihood_loss(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    class_counts,
    *,
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive loss with a mixture of Gaussians around each class's keys: CE(log S_c + log pi_c, y).

    S_c is the mean of exp(q . k / temperature) over the keys of class c. Suh and Seo, "Long-Tailed
    Recognition by Mutual Information Maximization between Latent Features and Ground-Truth Labels", ICML
    2023. Features are used as given, whatever their length: normalise them first, as the paper does. (For unit vectors
    alone, in less time, detection computes log S_c by ``lt_det.gml.log_mixture_likelihood``.)

    A class without a key is left out of the sum. A row whose own class has no key has no defined loss: it
    gives 0 under "none" and is left out of the mean, so the mean is over the other rows (0 if there is
    none).

    Args:
        queries: (R, D). labels: (R,) int64 in [0, C).
        keys: (M, D). key_labels: (M,) int64 in [0, C).
        class_counts: (C,) positive.
    """
    _check_reduction(reduction)
    _check_logits(queries, "queries")
    _check_logits(keys, "keys")
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, keys {keys.shape[1]}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    counts = as_positive_vector(class_counts, "class_counts", device=queries.device)
    num_classes = counts.numel()
    _check_labels(labels, queries.shape[0], num_classes)
    _check_labels(key_labels, keys.shape[0], num_classes, "key_labels")

    dtype = torch.promote_types(compute_dtype(queries.dtype), compute_dtype(keys.dtype))
    similarity = queries.to(dtype) @ keys.to(dtype).T / temperature
    num_keys = torch.bincount(key_labels, minlength=num_classes).to(dtype)
    index = key_labels.expand(similarity.shape[0], -1)
    # Log-sum-exp per class; the maximum is only there for the range, so it carries no gradient.
    peak = torch.full((similarity.shape[0], num_classes), float("-inf"), dtype=dtype, device=similarity.device)
    peak = peak.scatter_reduce(1, index, similarity.detach(), "amax")
    total = torch.zeros_like(peak).scatter_add(1, index, (similarity - peak.gather(1, index)).exp())
    log_mean = torch.where(num_keys > 0, total, 1.0).log() + peak - num_keys.clamp(min=1.0).log()
    losses, valid = mixture_cross_entropy(log_mean, log_relative_prior(counts), labels)
    if reduction == "mean":
        return losses.sum() / valid.sum().clamp(min=1)
    return _reduce(losses, reduction)


def logit_adjustment(logits: Tensor, class_counts, tau: float = 1.0) -> Tensor:
    """Post-hoc logit adjustment: logits - tau log pi, pi = counts / sum. Keeps the logits' shape and dtype.

    Menon et al., ICLR 2021, eq. 9.
    """
    _check_logits(logits)
    counts = as_positive_vector(class_counts, "class_counts", logits.shape[1], logits.device)
    adjustment = tau * (counts / counts.sum()).log()
    return logits - adjustment.to(logits.dtype)


def fracal_log_weights(image_share, dimensions, strength: float = 2.0, *, sigmoid: bool = False) -> Tensor:
    """(K,) float64 logarithms of what :func:`fracal_probabilities` multiplies to the odds of each class.

    softmax: -log10(K f_c) - strength log D_c; sigmoid: -log10(K f_c) - log10(K D_c^strength / sum_j D_j^strength).
    """
    share = as_positive_vector(image_share, "image_share")
    dimensions = as_positive_vector(dimensions, "dimensions", share.numel(), share.device)
    if not abs(share.sum().item() - 1) < 1e-4:
        raise ValueError(f"image_share must sum to 1, got {share.sum().item():g}: divide the counts by their sum")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be finite and not negative, got {strength}")
    shift = -(share * share.numel()).log10()
    if sigmoid:
        powers = dimensions**strength
        return shift - (powers / powers.mean()).log10()
    return shift - strength * dimensions.log()


def fracal_probabilities(
    logits: Tensor, image_share, dimensions, strength: float = 2.0, *, sigmoid: bool = False
) -> Tensor:
    """FRACAL: probabilities calibrated by how often a class occurs and how evenly its objects lie in the image.

    softmax(z_c - log10(K f_c)) / D_c^strength, renormalised over classes and background, whose shift is 0 and whose D
    is 1. With ``sigmoid``: sigmoid(z_c) sigmoid(z_c - log10(K f_c) - log10(K D_c^strength / sum_j D_j^strength)).
    The decimal logarithm is the method's. Alexandridis et al., Fractal Calibration for Long-tailed Object Detection,
    CVPR 2025.

    Args:
        logits: (R, K + 1), background last; with ``sigmoid`` (R, K).
        image_share: (K,) positive, summing to 1: f, the classes' shares of the training images that hold them.
        dimensions: (K,) positive: D, see :func:`lt_det.data.fractal_dimensions`.
        strength: exponent of D. At 0 the shift by frequency alone is left.

    Returns:
        Probabilities of the logits' shape; float32 for half-precision logits.
    """
    _check_logits(logits)
    weights = fracal_log_weights(image_share, dimensions, strength, sigmoid=sigmoid).to(logits.device)
    if logits.shape[1] != weights.numel() + (not sigmoid):
        raise ValueError(
            f"logits must have {weights.numel() + (not sigmoid)} columns for {weights.numel()} classes"
            f"{'' if sigmoid else ' and background'}, got {logits.shape[1]}"
        )
    z = logits.to(compute_dtype(logits.dtype))
    weights = weights.to(z.dtype)
    if sigmoid:
        return z.sigmoid() * (z + weights).sigmoid()
    return (z + F.pad(weights, (0, 1))).softmax(dim=1)


def logit_normalization(logits: Tensor, mean, std) -> Tensor:
    """LogN: (z_c - (mu_c - min mu)) / sigma_c for each class; columns after the first K (background) stay.

    Zhao et al., Logit Normalization for Long-tail Object Detection, IJCV 2024. mu and sigma are of a trained model's
    logits over training RoIs, background RoIs included.

    Args:
        logits: (R, K + 1), background last, or (R, K) of a model without background logit.
        mean: (K,) finite. std: (K,) positive.

    Returns:
        Logits of the same shape and dtype.
    """
    _check_logits(logits)
    std = as_positive_vector(std, "std", device=logits.device)
    mean = as_float64(mean, logits.device)
    if mean.shape != std.shape:
        raise ValueError(f"mean must have shape {tuple(std.shape)} as std, got {tuple(mean.shape)}")
    if not torch.isfinite(mean).all():
        raise ValueError("mean must be finite")
    if logits.shape[1] < std.numel():
        raise ValueError(f"logits must have {std.numel()} columns or more, got {logits.shape[1]}")
    return normalized_logits(logits, mean, std)


def normalized_logits(logits: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """:func:`logit_normalization` of arguments that are right, which TorchScript compiles."""
    num_classes = std.numel()
    z = logits[:, :num_classes].to(compute_dtype(logits.dtype))
    z = (z - (mean - mean.min()).to(z.dtype)) / std.to(z.dtype)
    return torch.cat([z.to(logits.dtype), logits[:, num_classes:]], dim=1)
