"""What LogN needs of a trained detector: mean and deviation of its logits, by one pass over training images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm

from lt_det.data import DatasetRecords, pass_over
from lt_det.modeling import Calibrator, DecoupledClassifier, LogitMoments, LogN, box_predictors
from lt_det.modeling.calibrators import classifier_key, moments_path, read_moments, write_moments

logger = logging.getLogger(__name__)

# Opens the training images for a pass over them: their records, what maps these, and batch_size, num_workers, seed and
# amp of pass_over.
TrainingImages = Callable[[], tuple[DatasetRecords, Callable, dict]]


@torch.no_grad()
def fit_moments(training: TrainingImages, detector: GeneralizedRCNN, *, images: int = 0) -> list[LogitMoments]:
    """Mean and standard deviation of the logits over the RoIs that training would sample, each image once; all ranks
    together. The detector is left as it was.

    Args:
        training: opens the training images.
        images: so many of the training images, evenly spread; 0: all.

    Returns:
        The moments of each classifier: one, or one a cascade stage. The standard deviation is that of the sample.

    Raises:
        ValueError: if a class's logit does not vary over the RoIs.
    """
    records, mapper, loading = training()
    if 0 < images < len(records):
        records = records.select([i * len(records) // images for i in range(images)])
    trained = {name: p.requires_grad for name, p in detector.named_parameters()}
    modes = {module: module.training for module in detector.modules()}
    module = DecoupledClassifier(detector)  # freezes the trunk and its batch norms
    sums: list[torch.Tensor] = []  # by classifier: (3, K), the RoIs, and their sums about the first RoI's logits
    origins: list[torch.Tensor] = []

    def add(inputs: list[dict], count: int) -> None:
        for k, rois in enumerate(module.roi_batches(inputs)):
            z = rois.predictor.cls_score(rois.of_first(count).features)[:, : rois.predictor.num_classes].double()
            if k == len(sums):
                sums.append(z.new_zeros(3, z.shape[1]))
                # Far from the mean, squares would lose their digits. All ranks take the same.
                first = z[0] if len(z) else z.new_zeros(z.shape[1])
                origins.append(torch.as_tensor(comm.all_gather(first.cpu())[0]).to(z))
            z = z - origins[k]
            sums[k] += torch.stack([torch.full_like(z[0:1].sum(0), len(z)), z.sum(0), z.square().sum(0)])

    try:
        pass_over(records, mapper, add, device=detector.device, description="Logits of training RoIs", **loading)
    finally:
        for name, parameter in detector.named_parameters():
            parameter.requires_grad_(trained[name])
        for part, mode in modes.items():
            part.training = mode
    keys = [classifier_key(p.cls_score) for p in box_predictors(detector)]
    return [_moments(*each) for each in zip(_over_ranks(sums), origins, keys)]


def _over_ranks(sums: list[torch.Tensor]) -> list[torch.Tensor]:
    gathered = comm.all_gather([s.cpu() for s in sums])
    return [torch.stack(parts).sum(0) for parts in zip(*gathered)]


def _moments(total: torch.Tensor, origin: torch.Tensor, classifier: str) -> LogitMoments:
    number, first, second = total
    mean = first / number
    variance = (second - first * mean) / (number - 1)
    constant = (~(variance > 0)).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"LogN: over {int(number[0])} training RoIs the logits of the classes {constant[:10]} do not vary; is the "
            "detector trained?"
        )
    mean = mean + origin.cpu()
    return LogitMoments(tuple(mean.tolist()), tuple(variance.sqrt().tolist()), int(number[0]), classifier)


def _uses_moments(calibrator: Calibrator | None) -> bool:
    return isinstance(calibrator, LogN) and calibrator.value > 0


def refit_calibrators(training: TrainingImages, detector: GeneralizedRCNN, path: str = "") -> None:
    """Where a detector in training is calibrated by LogN: take the moments of its present weights.

    Args:
        training: opens the training images.
        path: file to write them to as well; empty: none.
    """
    predictors = box_predictors(detector, required=False)
    if not any(_uses_moments(p.calibrator) for p in predictors):
        return
    moments = fit_moments(training, detector)
    for predictor in predictors:
        predictor.calibrator.set_moments(moments)
    if path and comm.is_main_process():
        write_moments(path, moments)


def complete_calibrators(
    training: TrainingImages, detector: GeneralizedRCNN, calibrators: Sequence[Calibrator | None], weights: str
) -> None:
    """Let those of the calibrators that are LogN have the moments of a trained detector: from their file, or where
    there is none by a pass over the training images, which writes it.

    Args:
        training: opens the training images.
        calibrators: what is about to calibrate it.
        weights: the checkpoint that was loaded.

    Raises:
        ValueError: if the file is of a classifier with other weights.
    """
    mine = [c for c in calibrators if _uses_moments(c)]
    if not mine:
        return
    path = mine[0].path or moments_path(weights)
    if comm.all_gather(os.path.isfile(path))[0]:
        moments = read_moments(path)
        keys = [classifier_key(p.cls_score) for p in box_predictors(detector)]
        if [m.classifier for m in moments] != keys:
            raise ValueError(
                f"LogN: the moments in {path} are of a classifier with other weights than {weights}; delete that file, "
                "or take them anew with tools/fit_logn.py"
            )
    else:
        logger.info("LogN: there is no file %r yet; one pass over the training images makes it", path)
        moments = fit_moments(training, detector)
        if path and comm.is_main_process():
            write_moments(path, moments)
    for calibrator in mine:
        calibrator.set_moments(moments)
