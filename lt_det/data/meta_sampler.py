"""Image sampling that follows class rates which are learned while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import Sampler

from .samplers import SAMPLER_REGISTRY, _max_over_image, _presence, _threshold_factors, options_in_config

__all__ = ["MetaSampler"]

# What DataLoader's workers load ahead each (the default of build_train_loader).
_PREFETCH_FACTOR = 2


@SAMPLER_REGISTRY.register()
class MetaSampler(Sampler):
    """Draws images in proportion to ``r(I) = max over c in I of f_c rho_c / mean rho``.

    rho are the class rates that BALMS's meta step learns (``META.NAME``), and f_c is the repeat factor of class c
    (``DATALOADER.REPEAT_THRESHOLD``; 1 with a threshold of 0). As long as the rates are equal, that is repeat-factor
    sampling. Source of the rates: Ren et al., NeurIPS 2020; for several classes in an image, the maximum of LVIS's
    repeat factors.

    Each batch of all ranks is drawn by systematic sampling: an image comes ``B r(I) / sum r`` times in expectation, and
    twice only if that is above 1. Rank k of W takes the draws k, k + W, ... of it, so no draw is made on two ranks.

    Workers load ahead, so rates cannot act at once. They act from a fixed draw on, ``lag`` batches later, which is past
    what any rank has drawn: so all ranks draw from the same distribution whenever each of them gets there.

    Args:
        dataset_dicts: N records in Detectron2's format.
        num_classes: K.
        batch_size: images in a batch, over all ranks.
        repeat_thresh: t of the repeat factors, 0 for none.
        seed: must agree on all ranks; by default one is drawn and shared.
        lag: batches between a change of the rates and its effect; more than what the loader draws ahead.
    """

    made_by = "from_records"
    shared_arguments = ("seed", "num_classes")
    resumable_by_replay = False

    def __init__(
        self,
        dataset_dicts: Sequence[Mapping[str, Any]],
        num_classes: int,
        *,
        batch_size: int,
        repeat_thresh: float = 0.0,
        sqrt: bool = True,
        seed: int | None = None,
        lag: int = 1,
    ):
        self._presence = _presence(dataset_dicts)
        size = len(self._presence.image_count)
        if size > num_classes:
            raise ValueError(f"The annotations have category_id {size - 1}, but there are {num_classes} classes.")
        world_size = comm.get_world_size()
        if batch_size <= 0 or batch_size % world_size:
            raise ValueError(f"batch_size ({batch_size}) must be a positive multiple of the {world_size} processes.")
        if lag < 1:
            raise ValueError(f"lag must be at least 1, got {lag}.")
        frequency = self._presence.image_count / self._presence.num_images
        self._class_factors = _threshold_factors(frequency, repeat_thresh, sqrt)
        self.num_classes = num_classes
        self._batch_size = batch_size
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self.lag = lag
        self._rank, self._world_size = comm.get_rank(), world_size
        self._batch = 0  # the next batch of all ranks to be drawn
        self._taken = 0  # draws of it that this rank has taken
        self._changes: deque[tuple[int, np.ndarray]] = deque()  # (first batch, rates), not yet in effect
        self._rates = np.ones(num_classes)
        self._set_order()
        self._set_factors()

    @classmethod
    def from_records(
        cls,
        dataset_dicts: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        loaded_ahead: int,
        num_classes: int | None = None,
        repeat_threshold: float = 0.0,
        repeat_sqrt: bool = True,
        seed: int | None = None,
    ) -> MetaSampler:
        """The sampler that a run makes of its name.

        Args:
            repeat_threshold: of the repeat factors; 0: none.
            repeat_sqrt: repeat by the square root of threshold over share of the images, as LVIS does.
            loaded_ahead: batches that workers load before their turn.
            num_classes: given by a run that has a meta step.

        Raises:
            ValueError: without ``num_classes``.
        """
        if num_classes is None:
            raise ValueError(
                "The sampler MetaSampler follows what the meta step of stage 2 learns: it goes into train.decouple "
                "beside train.decouple.meta. Choose another one here."
            )
        lag = loaded_ahead + 2  # one for the batch in training, one for images that wait for others of their shape
        options = {"repeat_thresh": repeat_threshold, "sqrt": repeat_sqrt}
        return cls(dataset_dicts, num_classes, batch_size=batch_size, seed=seed, lag=lag, **options)

    @classmethod
    def from_config(cls, cfg, dataset_dicts, *, seed, dataset_sizes=None):
        return cls.from_records(
            dataset_dicts,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            loaded_ahead=cfg.DATALOADER.NUM_WORKERS * _PREFETCH_FACTOR,
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            seed=seed,
            **options_in_config(cls, cfg),
        )

    @property
    def repeat_factors(self) -> torch.Tensor:
        """``(N,)`` float32, the relative frequency of each image under the rates now in effect."""
        return torch.from_numpy(self._factors).float()

    def follow(self, rates: Any, handed_out: int) -> None:
        """Let new rates act ``lag`` batches after those handed out.

        Args:
            rates: ``(K,)`` positive, alike on all ranks.
            handed_out: number of batches that the train loop has received, the same on all ranks.
        """
        rates = np.asarray(rates, dtype=np.float64)
        if rates.shape != (self.num_classes,) or not (np.isfinite(rates).all() and (rates > 0).all()):
            raise ValueError(f"rates must be {self.num_classes} positive numbers, got {rates}")
        first = handed_out + self.lag
        if first < self._batch or (first == self._batch and self._taken):
            raise RuntimeError(
                f"MetaSampler: batch {self._batch} is being drawn, so rates can no longer act from batch {first} on. "
                f"The loader draws more than lag = {self.lag} batches ahead; build the sampler with the "
                "DATALOADER.NUM_WORKERS in use."
            )
        self._changes.append((first, rates))

    def __iter__(self) -> Iterator[int]:
        while True:
            draws = self._draw(self._batch)[self._rank :: self._world_size]
            while self._taken < len(draws):
                self._taken += 1
                yield int(draws[self._taken - 1])
            self._batch, self._taken = self._batch + 1, 0

    def _draw(self, batch: int) -> np.ndarray:
        while self._changes and self._changes[0][0] <= batch:
            self._rates = self._changes.popleft()[1]
            self._set_factors()
        # A stream of numbers for each batch: nothing that was drawn before matters.
        random = np.random.default_rng(np.random.SeedSequence(entropy=self._seed, spawn_key=(batch,)))
        points = (np.arange(self._batch_size) + random.random()) * (self._total[-1] / self._batch_size)
        draws = np.searchsorted(self._total, points, side="right")
        return random.permutation(self._order[np.minimum(draws, len(self._total) - 1)])

    def _set_order(self) -> None:
        # Systematic sampling keeps neighbours apart; in an order of its own, these are not neighbours in the
        # file.
        self._order = np.random.default_rng(self._seed).permutation(self._presence.num_images)

    def _set_factors(self) -> None:
        size = len(self._class_factors)
        factors = self._class_factors * self._rates[:size] / self._rates.mean()
        self._factors = _max_over_image(self._presence, factors, empty=1.0)
        self._total = np.cumsum(self._factors[self._order])

    def state_dict(self) -> dict:
        """Where the stream stands. The random numbers follow from the seed."""
        # As tensors, which checkpoints may hold where numpy arrays may not (torch.load with weights_only).
        return {
            "batch": self._batch,
            "taken": self._taken,
            "rates": torch.tensor(self._rates),
            "changes": [(first, torch.tensor(rates)) for first, rates in self._changes],
            "lag": self.lag,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler of the same data stood.

        Raises:
            ValueError: if more workers load ahead now than the state's rates were timed for.
        """
        if self.lag > state["lag"]:
            raise ValueError(
                f"The run was started with rates that act {state['lag']} batches later, but now the workers load "
                f"{self.lag} ahead. Resume with a smaller DATALOADER.NUM_WORKERS, as it was."
            )
        self._batch, self._taken, self.lag = int(state["batch"]), int(state["taken"]), int(state["lag"])
        self._seed = int(state["seed"])
        self._rates = np.array(state["rates"], dtype=np.float64)
        self._changes = deque((int(first), np.array(rates, dtype=np.float64)) for first, rates in state["changes"])
        self._set_order()
        self._set_factors()
