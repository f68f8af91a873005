"""One pass over training images beside the training itself: of the feature cache, and to fill GML's queues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from lt_det.precision import autocast
from lt_det.progress import progress_bar

from .samplers import InOrderSampler
from .train_loader import build_train_loader


def pass_over(
    records: Sequence[Mapping[str, Any]],
    mapper: Callable[[dict], dict | None],
    use: Callable[[list[dict], int], None],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    device: torch.device,
    amp: bool,
    description: str,
) -> None:
    """Call ``use(inputs, count)`` with this rank's batches, in order, until each image was seen once; all ranks do.

    All ranks have as many batches, so that ``use`` may gather over them. The training's random numbers and what it logs
    are left alone.

    Args:
        records: the images in Detectron2's format.
        use: gets a batch of what ``mapper`` makes of them; its first ``count`` (0 included) are new, the rest fills it
            up.
        batch_size: images, over all ranks.
        num_workers: processes that load images.
        seed: of the augmentation, and of what ``use`` draws.
        device: whose random numbers ``use`` may move.
        amp: mixed precision.
        description: of the progress bar.
    """
    sampler = InOrderSampler(len(records), batch_size // comm.get_world_size())
    loader = build_train_loader(
        records,
        mapper,
        sampler,
        total_batch_size=batch_size,
        aspect_ratio_grouping=False,
        num_workers=num_workers,
        seed=seed,
    )
    on_gpu = device.type == "cuda"
    left = sampler.count
    progress = progress_bar(total=left, unit="image", desc=description, show=comm.is_main_process())
    with progress, EventStorage(), torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.manual_seed(seed)
        for inputs in loader:
            count = min(left, len(inputs))
            with autocast(device, amp):
                use(inputs, count)
            left -= count
            progress.update(count)
