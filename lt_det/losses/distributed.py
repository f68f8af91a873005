"""Sums and rows over ranks, for statistics and queues that losses accumulate."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 when training is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """``tensor`` summed over all ranks, in place; itself when training is not distributed."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, in the order of the ranks; the tensors themselves when not distributed.

    Args:
        tensors: each (N, ...), with the same N and on the same device. N may differ between ranks (0
            included); the other dimensions and the dtypes may not.

    Returns:
        Each tensor as (sum of all ranks' N, ...), the same on every rank, without gradient.
    """
    ranks = world_size()
    if ranks == 1:
        return tensors
    rows = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
    sizes = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(sizes, rows)
    lengths = torch.cat(sizes).tolist()
    if max(lengths) == 0:
        return tensors
    gathered = []
    for tensor in tensors:
        # Collectives want the same shape everywhere.
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, lengths)]))
    return tuple(gathered)
