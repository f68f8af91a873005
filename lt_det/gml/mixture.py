"""The likelihood of queries under each class's mixture of keys, as one matrix product and one reduction.

A second implementation beside ``lt_det.losses.functional.gaussian_mixture_likelihood_loss``, for what autograd through
that one, whose features may have any length, would cost at LVIS's sizes. ``tests/losses/test_gml.py`` holds the two
together in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lt_det.losses.gml import MIN_TEMPERATURE
from lt_det.losses.kernels import compute_dtype

# Sums of exponentials are kept from 0 by what no sum over unit vectors falls below, but for rounding.
_SMALLEST_SUM = 0.5 * math.exp(-2.0 / MIN_TEMPERATURE)

# Box id of a query or a key that comes from no ground-truth box, or from one without an id.
NO_BOX = -1


def segment_sums(matrix: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """(S, R) sums of the rows of ``matrix`` (M, R) by their ``segment`` (M,).

    At LVIS's sizes (M = 16384, R = 256, 1203 segments) this takes 0.8 ms on one thread; a product with
    a sparse CSR matrix takes 2 ms, ``torch.segment_reduce`` 12 ms, the same sum over the columns of (R, M) 22
    ms, and differences of a cumulative sum, which lose four digits, 60 ms.
    """
    return matrix.new_zeros(num_segments, matrix.shape[1]).index_add_(0, segment, matrix)


class _LogMixtureLikelihood(torch.autograd.Function):
    """Works on (M, R) rather than (R, M): what belongs to a key, or to a class, is then a contiguous row."""

    @staticmethod
    def forward(ctx, queries, keys, temperature, offsets, query_box_ids, key_box_ids):
        num_classes, num_keys = offsets.numel() - 1, keys.shape[0]
        count = offsets.diff()
        class_of_key = torch.repeat_interleave(
            torch.arange(num_classes, device=keys.device), count, output_size=num_keys
        )
        rate = (1.0 / temperature).expand(num_classes)
        rate_of_key = rate[class_of_key, None]
        with torch.autocast(device_type=queries.device.type, enabled=False):
            kernel = torch.addmm(-rate_of_key, keys * rate_of_key, queries.T).exp_()
        usable = count.to(kernel.dtype)[:, None]
        if query_box_ids is not None:
            # Few keys come from boxes of this batch: only their rows are looked at.
            hits = torch.isin(key_box_ids, query_box_ids).nonzero().squeeze(1)
            if hits.numel():
                own = (key_box_ids[hits, None] == query_box_ids) & (query_box_ids != NO_BOX)
                kernel[hits] = kernel[hits].masked_fill_(own, 0.0)
                usable = usable - segment_sums(own.to(kernel.dtype), class_of_key[hits], num_classes)
        # Nothing may divide by a sum of 0, be it of no key or of exponentials that have underflowed.
        total = segment_sums(kernel, class_of_key, num_classes).clamp_(min=_SMALLEST_SUM)
        log_s = total.log() - usable.clamp(min=1.0).log() + rate[:, None]
        log_s = torch.where(usable > 0, log_s, -math.inf)
        ctx.save_for_backward(queries, keys, temperature, kernel, total, usable, class_of_key)
        return log_s.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, keys, temperature, kernel, total, usable, class_of_key = ctx.saved_tensors
        num_classes = total.shape[0]
        rate = (1.0 / temperature).expand(num_classes)
        # d log S_c / d (q.k) = exp((q.k - 1) / T_c) / (T_c total_c): a softmax over the keys of the class.
        factor = torch.where(usable > 0, grad.T * rate[:, None] / total, 0.0)
        grad_product = factor[class_of_key].mul_(kernel)
        grad_queries = grad_keys = grad_temperature = None
        with torch.autocast(device_type=queries.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_queries = grad_product.T @ keys
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                grad_keys = grad_product @ queries
        if ctx.needs_input_grad[2]:
            # d log S_c / d T_c = -(sum over keys of their softmax times q.k) / T_c^2. The products q.k are
            # not kept and need not be: sum_r grad_product[m, r] (q_r . k_m) = k_m . grad_keys[m].
            by_key = (keys * grad_keys).sum(dim=1, keepdim=True)
            by_class = -segment_sums(by_key, class_of_key, num_classes).squeeze(1) * rate
            grad_temperature = by_class if temperature.numel() == num_classes else by_class.sum()
            grad_temperature = grad_temperature.reshape(temperature.shape)
        if not ctx.needs_input_grad[1]:
            grad_keys = None
        return grad_queries, grad_keys, grad_temperature, None, None, None


def log_mixture_likelihood(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    temperature: Tensor | float,
    *,
    query_box_ids: Tensor | None = None,
    key_box_ids: Tensor | None = None,
) -> Tensor:
    """log S_c(q): the log of the mean over the keys k of class c of exp(q . k / T_c).

    The class likelihood of Suh and Seo, ICML 2023, a mixture of Gaussians (on the sphere) around the keys of
    the class, up to a constant. One matrix product and one segmented sum; of size (R, M) one tensor is kept
    for the backward pass, of size (R, M, K) none is made. Computed in float32 (float64 for float64 inputs)
    under autocast too. Differentiable once, by queries, keys and temperature.

    Args:
        queries: (R, d) unit vectors.
        keys: (M, d) unit vectors, sorted by class.
        offsets: (K + 1,) int64, class c having keys ``offsets[c]:offsets[c + 1]``; the last is M.
        temperature: T, a scalar, (1,) or (K,), at least ``MIN_TEMPERATURE``.
        query_box_ids: (R,) int64; a query does not see the keys of its own box, those with an equal id.
            ``NO_BOX`` is equal to none.
        key_box_ids: (M,) int64, wanted together with ``query_box_ids``.

    Returns:
        (R, K); -inf where a class has no key that the query may see. These carry no gradient.

    Raises:
        ValueError: if shapes disagree or (on the CPU) a temperature is too low.
    """
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries (R, d) and keys (M, d) must agree in d, got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    dtype = torch.promote_types(compute_dtype(queries.dtype), compute_dtype(keys.dtype))
    temperature = torch.as_tensor(temperature, dtype=dtype, device=queries.device)
    if temperature.numel() not in (1, offsets.numel() - 1) or temperature.dim() > 1:
        raise ValueError(
            f"temperature must be a scalar or have shape ({offsets.numel() - 1},), got {tuple(temperature.shape)}"
        )
    # A NaN passes: it makes the loss non-finite, which the trainer reports.
    if temperature.device.type == "cpu" and (temperature.detach() < MIN_TEMPERATURE * 0.999).any():
        raise ValueError(f"temperatures below {MIN_TEMPERATURE} underflow in float32, got {temperature.min().item():g}")
    if (query_box_ids is None) != (key_box_ids is None):
        raise ValueError("query_box_ids and key_box_ids go together")
    if query_box_ids is not None and (query_box_ids.shape != queries.shape[:1] or key_box_ids.shape != keys.shape[:1]):
        raise ValueError(
            f"box ids must have shapes {tuple(queries.shape[:1])} and {tuple(keys.shape[:1])}, got"
            f" {tuple(query_box_ids.shape)} and {tuple(key_box_ids.shape)}"
        )
    return _LogMixtureLikelihood.apply(
        queries.to(dtype), keys.to(dtype), temperature, offsets, query_box_ids, key_box_ids
    )
