"""Class-wise queues of features: the key memory of GML."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lt_det.losses.distributed import gather_rows
from lt_det.losses.functional import as_positive_vector

QUEUE_DTYPES = (torch.float32, torch.bfloat16)


def queue_sizes(class_counts, total: int, base: int) -> Tensor:
    """How many slots each class has: K_c = base + (Q - K base) pi_c, rounded so that they sum to Q.

    Suh and Seo, ICML 2023. Fractions are rounded by largest remainders (of equal ones the lower class first),
    so that the memory is ``total`` slots exactly and no class has fewer than ``base``.

    Args:
        class_counts: (K,) positive counts; pi_c is their share.
        total: Q, the slots of all classes.
        base: slots that each class has whatever its count, at least 1.

    Returns:
        (K,) int64.

    Raises:
        ValueError: if ``base`` is below 1 or ``total`` has no room for it.
    """
    counts = as_positive_vector(class_counts, "class_counts").cpu()
    num_classes = counts.numel()
    if base < 1:
        raise ValueError(
            f"MODEL.LONG_TAIL.GML.QUEUE_BASE (queue_base) must be at least 1, so that every class has a key; got {base}"
        )
    rest = total - num_classes * base
    if rest < 0:
        raise ValueError(
            f"MODEL.LONG_TAIL.GML.QUEUE_SIZE (queue_size) is {total}, but {num_classes} classes with"
            f" MODEL.LONG_TAIL.GML.QUEUE_BASE (queue_base) {base} take {num_classes * base} slots: raise the"
            " one or lower the other"
        )
    quota = rest * counts / counts.sum()
    whole = quota.floor().to(torch.int64)
    missing = rest - int(whole.sum())
    largest = torch.argsort(quota - whole, descending=True, stable=True)[:missing]
    whole[largest] += 1
    return whole + base


class ClassQueues(nn.Module):
    """First-in-first-out queues of features, one a class, in one contiguous buffer.

    The slots of a class are contiguous, and classes follow each other. Everything but what follows from
    the sizes is in the state dict, so that training resumes with the keys it had. All ranks hold the same
    queues: :meth:`insert` gathers what the ranks have.

    Buffers: ``keys`` (Q, width), ``box_ids`` (Q,) int64 with the id of the ground-truth box that a key comes
    from (-1: empty), ``filled`` (K,) int64 used slots, ``position`` (K,) int64 next slot to write within a
    class, ``sizes`` (K,) int64; ``offsets`` (K + 1,) and ``class_of_slot`` (Q,) int64 follow from the sizes.
    """

    __jit_unused_properties__ = ["num_classes", "width", "full", "megabytes"]

    def __init__(self, sizes, width: int, *, dtype: torch.dtype = torch.float32):
        """
        Args:
            sizes: (K,) int64 slots of each class, at least one each; see :func:`queue_sizes`.
            width: of a feature.
            dtype: of the stored features, float32 or bfloat16.

        Raises:
            ValueError: for a class without slots, or another dtype.
        """
        super().__init__()
        sizes = torch.as_tensor(sizes, dtype=torch.int64)
        if sizes.dim() != 1 or sizes.numel() == 0 or (sizes < 1).any():
            raise ValueError(f"queue sizes must be a vector of positive numbers, got {sizes.tolist()}")
        if dtype not in QUEUE_DTYPES:
            raise ValueError(f"queues hold {' or '.join(map(str, QUEUE_DTYPES))}, not {dtype}")
        total = int(sizes.sum())
        self.register_buffer("keys", torch.zeros(total, width, dtype=dtype))
        self.register_buffer("box_ids", torch.full((total,), -1))
        self.register_buffer("filled", torch.zeros_like(sizes))
        self.register_buffer("position", torch.zeros_like(sizes))
        # Saved only to be compared on loading: other sizes with the same total would give keys to other
        # classes without anything else to notice it.
        self.register_buffer("sizes", sizes.clone())
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self.register_buffer("offsets", offsets, persistent=False)
        class_of_slot = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)
        self.register_buffer("class_of_slot", class_of_slot, persistent=False)

    @property
    def num_classes(self) -> int:
        return self.sizes.numel()

    @property
    def width(self) -> int:
        return self.keys.shape[1]

    @property
    def full(self) -> bool:
        """Whether every slot of every class is in use. Waits for the device."""
        return bool((self.filled == self.sizes).all())

    @property
    def megabytes(self) -> float:
        """Memory of all buffers, in 10^6 bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) / 1e6

    @torch.no_grad()
    def insert(self, features: Tensor, labels: Tensor, box_ids: Tensor) -> None:
        """Append the rows of all ranks, each to the queue of its class; the oldest make room.

        The same as inserting them one by one in the order of their box ids, so that it does not matter on
        which rank a box was: of more rows than a class has slots the last are kept. Collective: every rank
        calls it, with any number of rows.

        Args:
            features: (N, width), any floating dtype.
            labels: (N,) int64 in [0, K).
            box_ids: (N,) int64, of the ground-truth boxes.

        Raises:
            ValueError: if shapes disagree, or (on the CPU) labels are out of range.
        """
        self._check(features, labels, box_ids)
        features = features.to(self.keys)  # before gathering: bfloat16 halves what travels
        features, labels, box_ids = gather_rows(features, labels.to(self.sizes), box_ids.to(self.box_ids))
        if labels.numel() == 0:
            return
        order = torch.argsort(box_ids, stable=True)
        order = order[torch.argsort(labels[order], stable=True)]
        sorted_labels = labels[order]
        count = torch.zeros_like(self.sizes).scatter_add_(0, labels, torch.ones_like(labels))
        first = (count.cumsum(0) - count)[sorted_labels]
        size, row_count = self.sizes[sorted_labels], count[sorted_labels]
        rank = torch.arange(labels.numel(), device=labels.device) - first  # within the rows of its class
        slot = self.offsets[sorted_labels] + (self.position[sorted_labels] + rank) % size
        # Rows that a later one of the batch overwrites are not dropped, which would make the device wait for
        # their number, but replaced by the last row that falls on their slot: all write the same.
        last = rank + (row_count - 1 - rank) // size * size
        source = order[first + last]
        self.keys[slot] = features[source]
        self.box_ids[slot] = box_ids[source]
        self.position.copy_((self.position + count) % self.sizes)
        self.filled.copy_(torch.minimum(self.filled + count, self.sizes))

    def contents(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is in the queues, without empty slots; not to be changed.

        Returns:
            keys (M, width); offsets (K + 1,) int64, class c having keys ``offsets[c]:offsets[c + 1]``;
            box_ids (M,) int64.
        """
        within = torch.arange(self.class_of_slot.numel(), device=self.keys.device)
        within = within - self.offsets[self.class_of_slot]
        slots = (within < self.filled[self.class_of_slot]).nonzero().squeeze(1)
        if slots.numel() == self.keys.shape[0]:
            return self.keys, self.offsets, self.box_ids
        offsets = torch.cat([self.filled.new_zeros(1), self.filled.cumsum(0)])
        return self.keys[slots], offsets, self.box_ids[slots]

    def _check(self, features: Tensor, labels: Tensor, box_ids: Tensor) -> None:
        if features.dim() != 2 or features.shape[1] != self.width:
            raise ValueError(
                f"features must have shape (N, {self.width}), the width of the queues; got {tuple(features.shape)}"
            )
        for name, vector in (("labels", labels), ("box_ids", box_ids)):
            if vector.shape != (features.shape[0],):
                raise ValueError(f"{name} must have shape ({features.shape[0]},), got {tuple(vector.shape)}")
        if labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels must lie in [0, {self.num_classes}): queues have no background; got values from"
                    f" {low} to {high}"
                )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        saved = state_dict.get(prefix + "sizes")
        if saved is not None and not torch.equal(saved.cpu(), self.sizes.cpu()):
            error_msgs.append(
                "the checkpoint's queues have other sizes by class than these: the class statistics,"
                " MODEL.LONG_TAIL.PRIOR, GML.QUEUE_SIZE or GML.QUEUE_BASE have changed since"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
