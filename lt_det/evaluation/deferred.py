"""Leaves the pasting of masks to the evaluator."""

from __future__ import annotations

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances, ROIMasks
from torch import nn

__all__ = ["DeferredMaskPasting", "postprocess_without_pasting"]


def postprocess_without_pasting(instances: Instances, height: int, width: int) -> Instances:
    """Detectron2's ``detector_postprocess`` with ``pred_masks`` (N, 1, M, M) kept as ROIMasks (N, M, M).

    Args:
        instances: raw output of the ROI heads, in the coordinates of the network's input.
        height, width: of the original image.
    """
    fields = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
    # detector_postprocess drops boxes that became empty; the row number finds the masks of the others.
    fields["row"] = torch.arange(len(instances), device=instances.scores.device)
    out = detector_postprocess(Instances(instances.image_size, **fields), height, width)
    if instances.has("pred_masks"):
        out.pred_masks = ROIMasks(instances.pred_masks[:, 0][out.row])
    out.remove("row")
    return out


class DeferredMaskPasting(nn.Module):
    """A Mask R-CNN whose outputs keep their masks small, as :class:`ROIMasks`.

    Detectron2 pastes every mask into a bitmap of the whole image: seconds an image with 300 masks on a CPU, hundreds of
    megabytes on a GPU. LongTailLVISEvaluator pastes only those that the metrics look at, straight into run lengths. Use
    it for evaluation only::

        inference_on_dataset(DeferredMaskPasting(model), loader, evaluator)

    Models without masks work too.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: a :class:`GeneralizedRCNN` (or a DistributedDataParallel of one).

        Raises:
            TypeError: the model is something else, whose outputs this cannot intercept.
        """
        super().__init__()
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        if not isinstance(inner, GeneralizedRCNN):
            raise TypeError(
                f"DeferredMaskPasting wraps GeneralizedRCNN, not {type(inner).__name__}; evaluate the model as it is."
            )
        self.model = inner
        self.train(inner.training)

    def forward(self, batched_inputs: list[dict[str, torch.Tensor]]) -> list[dict[str, Instances]]:
        """As ``GeneralizedRCNN.forward`` in evaluation mode, but for the type of ``pred_masks``."""
        if self.training:
            raise RuntimeError("DeferredMaskPasting is for evaluation; call eval() on it, and train the model itself.")
        results = self.model.inference(batched_inputs, do_postprocess=False)
        outputs = []
        for instances, one_input in zip(results, batched_inputs):
            height = one_input.get("height", instances.image_size[0])
            width = one_input.get("width", instances.image_size[1])
            outputs.append({"instances": postprocess_without_pasting(instances, height, width)})
        return outputs
