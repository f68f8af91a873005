"""Row-wise loss kernels shared by the public formulas and by the detection losses.

A classification loss over (R, K) logits is limited by memory traffic, not by arithmetic. Written naively,
every shift, mask or weight makes one more (R, K) tensor, most of which autograd then keeps until the
backward pass. The kernels here avoid that:

* :func:`adjusted_cross_entropy` (softmax family) keeps one (R, C) tensor, the softmax, as ``F.cross_entropy``
  does; :func:`rowwise_loss` (everything else) one too, the logits, unless it is told to save time;
* :func:`binary_cross_entropy` (sigmoid family) keeps the logits and their gradient, as
  ``F.binary_cross_entropy_with_logits`` keeps the logits and the targets.

All work through the rows in chunks on the CPU, so that temporaries stay in the cache, and take all rows at
once elsewhere. Half-precision logits are computed in float32. First and second derivatives are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# A thread's share of a chunk's temporaries should fit into its core's second-level cache (typically 1 to
# 2 MB). Not much smaller: every operation on a chunk makes all threads wait for each other.
_CHUNK_BYTES = 1024 * 1024


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_chunks(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    step = num_rows
    if device.type == "cpu":
        step = max(1, _CHUNK_BYTES * torch.get_num_threads() // max(1, num_columns * dtype.itemsize))
    for start in range(0, num_rows, max(1, step)):
        yield slice(start, min(num_rows, start + step))


def _adjusted(logits: Tensor, dtype: torch.dtype, scale: float, adjust, rows: slice) -> Tensor:
    """``scale * logits + adjustment`` in ``dtype``; the logits themselves where that is all the same."""
    if adjust is None and scale == 1.0:
        return logits.to(dtype)
    z = torch.empty(logits.shape, dtype=dtype, device=logits.device).copy_(logits)
    if scale != 1.0:
        z.mul_(scale)
    if adjust is not None:
        adjust(z, rows)
    return z


class _AdjustedCrossEntropy(torch.autograd.Function):
    """Outputs the loss (R,) and the softmax (R, C), an output so that second derivatives can reach it."""

    @staticmethod
    def forward(logits, labels, scale, adjust):
        dtype = compute_dtype(logits.dtype)
        loss = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
        probs = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        for rows in _row_chunks(*logits.shape, dtype, logits.device):
            z, y = _adjusted(logits[rows], dtype, scale, adjust, rows), labels[rows, None]
            p = torch.softmax(z, dim=1, out=probs[rows])
            # The label's probability may underflow, the largest one cannot: log-sum-exp = z_max - log p_max.
            log_sum_exp = z.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()
            loss[rows] = (log_sum_exp - z.gather(1, y)).squeeze(1)
        return loss, probs

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], labels)
        ctx.scale, ctx.dtype = scale, logits.dtype

    @staticmethod
    def backward(ctx, grad_loss, grad_probs):
        probs, labels = ctx.saved_tensors
        grad = None
        if grad_loss is not None:
            g = (grad_loss * ctx.scale).unsqueeze(1)
            grad = (probs * g).scatter_add_(1, labels[:, None], -g)
        if grad_probs is not None:  # only in a second derivative
            inner = probs * ctx.scale * (grad_probs - (probs * grad_probs).sum(dim=1, keepdim=True))
            grad = inner if grad is None else grad + inner
        return (None if grad is None else grad.to(ctx.dtype)), None, None, None


def adjusted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    adjust: Callable[[Tensor, slice], None] | None = None,
) -> Tensor:
    """Cross entropy of ``scale * logits + adjustment``, a row each.

    Args:
        logits: (R, C) float tensor.
        labels: (R,) int64 in [0, C).
        scale: multiplies the logits (LDAM's s).
        adjust: called as ``adjust(z, rows)`` with the scaled logits ``z`` of the rows in the slice
            ``rows``; adds to ``z`` in place. What it adds is a constant for the gradient.

    Returns:
        (R,) losses in float32 (float64 for float64 logits).
    """
    return _AdjustedCrossEntropy.apply(logits, labels, scale, adjust)[0]


class _RowwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, function, plain, keep_gradient):
        dtype = compute_dtype(logits.dtype)
        loss = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
        gradient = None
        if keep_gradient and ctx.needs_input_grad[0]:
            gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        for rows in _row_chunks(*logits.shape, dtype, logits.device):
            loss[rows] = function(logits[rows].to(dtype), rows, None if gradient is None else gradient[rows])
        ctx.function, ctx.plain = function, plain
        ctx.save_for_backward(logits, gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, gradient = ctx.saved_tensors
        dtype = compute_dtype(logits.dtype)
        if torch.is_grad_enabled():  # create_graph=True: differentiate the plain formula once more
            (grad,) = torch.autograd.grad(ctx.plain(logits.to(dtype)), logits, grad_loss, create_graph=True)
            return grad, None, None, None
        if gradient is not None:
            return (gradient * grad_loss.unsqueeze(1)).to(logits.dtype), None, None, None
        grad = torch.empty_like(logits)
        for rows in _row_chunks(*logits.shape, dtype, logits.device):
            z = logits[rows].to(dtype)
            # In half precision the derivative is rounded once, when it is complete.
            target = grad[rows] if grad.dtype == dtype else torch.empty_like(z)
            ctx.function(z, rows, target)
            target.mul_(grad_loss[rows, None])
            if grad.dtype != dtype:
                grad[rows] = target
        return grad, None, None, None


def rowwise_loss(
    logits: Tensor,
    function: Callable[[Tensor, slice, Tensor | None], Tensor],
    plain: Callable[[Tensor], Tensor],
    *,
    keep_gradient: bool = False,
) -> Tensor:
    """A loss of independent rows with its derivative written by hand.

    Args:
        logits: (R, C) float tensor.
        function: called as ``function(z, rows, gradient)``, without autograd, with the logits ``z``
            (float32, or float64 for float64 logits; not to be changed) of the rows in the slice ``rows``;
            returns their (len(z),) losses and fills ``gradient`` (len(z), C) with their derivatives unless
            that is None.
        plain: the same loss of all rows, (R, C) to (R,), by differentiable operations; only called for a
            second derivative.
        keep_gradient: where loss and derivative share costly steps, make both in the forward pass, and keep
            the derivative beside the logits. Otherwise ``function`` is called in both passes, so it must draw
            nothing at random; what it returns the second time is not read.

    Returns:
        (R,) losses in float32 (float64 for float64 logits).
    """
    return _RowwiseLoss.apply(logits, function, plain, keep_gradient)


# A weight of the negatives: (C,) for all rows, or a function of the adjusted logits (n, C) of the rows in a
# slice, which returns a new (n, C) tensor and is a constant for the gradient.
NegativeWeight = Tensor | Callable[[Tensor, slice], Tensor] | None


def weights_of_negatives(negative_weight: NegativeWeight, z: Tensor, rows: slice) -> Tensor | None:
    """What ``negative_weight`` says of the adjusted logits ``z`` of the rows; None: 1."""
    return negative_weight(z, rows) if callable(negative_weight) else negative_weight


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), which float32 can evaluate up to the threshold; above, it is z to the last digit."""
    return F.softplus(z, threshold=80.0)


class _BinaryCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, scale, adjust, negative_weight, positive_weight, keep_gradient):
        dtype, num_classes = compute_dtype(logits.dtype), logits.shape[1]
        loss = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
        gradient = torch.empty(0, dtype=dtype, device=logits.device)
        keep_gradient = keep_gradient or ctx.needs_input_grad[0]
        if keep_gradient:
            gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        index = labels.clamp(max=num_classes - 1)[:, None]
        positive = (labels < num_classes).to(dtype)[:, None]
        if positive_weight is not None:
            positive = positive * positive_weight.to(dtype)[index]
        is_class = (labels < num_classes)[:, None]
        for rows in _row_chunks(*logits.shape, dtype, logits.device):
            z = _adjusted(logits[rows], dtype, scale, adjust, rows)
            i, p = index[rows], positive[rows]
            own = z.gather(1, i)
            # softplus(z) = -log(1 - sigmoid(z)), the loss of a negative; its gradient is sigmoid(z).
            negative = softplus(z)
            grad = torch.sigmoid(z, out=gradient[rows]) if keep_gradient else None
            weight = weights_of_negatives(negative_weight, z, rows)
            if weight is not None:
                negative.mul_(weight)
                if grad is not None:
                    grad.mul_(weight)
            # The label's column is a positive, not a negative.
            negative.scatter_(1, i, torch.where(is_class[rows], 0.0, negative.gather(1, i)))
            loss[rows] = negative.sum(dim=1) + (p * softplus(-own)).squeeze(1)
            if grad is not None:
                grad.scatter_(1, i, torch.where(is_class[rows], -p * torch.sigmoid(-own), grad.gather(1, i)))
                if scale != 1.0:
                    grad.mul_(scale)
        ctx.arguments = (labels, scale, adjust, negative_weight, positive_weight)
        ctx.save_for_backward(logits, gradient)
        ctx.mark_non_differentiable(gradient)
        return loss, gradient

    @staticmethod
    def backward(ctx, grad_loss, _):
        logits, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the plain formula once more
            loss = _plain_binary_cross_entropy(logits, *ctx.arguments)
            (grad,) = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)
        else:
            grad = (gradient * grad_loss.unsqueeze(1)).to(logits.dtype)
        return grad, None, None, None, None, None, None


def _plain_binary_cross_entropy(logits, labels, scale, adjust, negative_weight, positive_weight) -> Tensor:
    dtype, num_classes, rows = compute_dtype(logits.dtype), logits.shape[1], slice(0, logits.shape[0])
    z = _adjusted(logits, dtype, scale, adjust, rows)
    target = one_hot_foreground(labels, num_classes, dtype)
    weight = torch.ones_like(target)
    if negative_weight is not None:
        weight = weight * weights_of_negatives(negative_weight, z.detach(), rows)
    positive = torch.ones_like(weight) if positive_weight is None else positive_weight.to(dtype).expand_as(weight)
    weight = torch.where(target > 0, positive, weight)
    return F.binary_cross_entropy_with_logits(z, target, weight=weight, reduction="none").sum(dim=1)


def binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    adjust: Callable[[Tensor, slice], None] | None = None,
    negative_weight: NegativeWeight = None,
    positive_weight: Tensor | None = None,
    return_gradient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Binary cross entropy of C sigmoids of ``scale * logits + adjustment``, summed over classes.

    Args:
        logits: (R, C) float tensor.
        labels: (R,) int64; labels of C and above have no positive class.
        scale, adjust: as in :func:`adjusted_cross_entropy`.
        negative_weight: weights of the negatives, see ``NegativeWeight``; None: 1.
        positive_weight: (C,) weights of the positives; None: 1.
        return_gradient: also return the derivative of each row's loss by its logits, for statistics.

    Returns:
        (R,) losses in float32 (float64 for float64 logits), and (R, C) derivatives, constants, if asked for.
    """
    loss, gradient = _BinaryCrossEntropy.apply(
        logits, labels, scale, adjust, negative_weight, positive_weight, return_gradient
    )
    return (loss, gradient) if return_gradient else loss


def one_hot_foreground(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(R, K) one-hot targets; rows of the background label K are all zero."""
    target = torch.zeros(labels.shape[0], num_classes, dtype=dtype, device=labels.device)
    foreground = (labels < num_classes).to(dtype)[:, None]
    return target.scatter_(1, labels.clamp(max=num_classes - 1)[:, None], foreground)


def column_sums(matrix: Tensor) -> Tensor:
    """(C,) float64 sums over the rows of (R, C), without a float64 copy of the whole."""
    sums = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in matrix.split(1024):
        sums += block.sum(dim=0, dtype=torch.float64)
    return sums


def mixture_cross_entropy(log_likelihood: Tensor, log_prior: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """CE(log S_c + log pi_c, y) of rows whose own class has a key.

    Args:
        log_likelihood: (R, K) log S_c; -inf for classes without a key.
        log_prior: (K,) log pi_c, up to a constant.
        labels: (R,) int64 in [0, K).

    Returns:
        (R,) losses, 0 where the row's own class has no key, and (R,) bool, whether it has one.
    """
    valid = log_likelihood.detach().gather(1, labels[:, None]) != -torch.inf
    # Rows without one are levelled first: their infinite loss, multiplied by zero, would be NaN.
    logits = torch.where(valid, log_likelihood + log_prior.to(log_likelihood.dtype), 0.0)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(valid.squeeze(1), losses, 0.0), valid.squeeze(1)
