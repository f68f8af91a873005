"""Checkpoints that are written atomically and that say plainly when they do not fit."""

from __future__ import annotations

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer


def check_weights_path(path: str, key: str = "MODEL.WEIGHTS") -> None:
    """Raise ``FileNotFoundError`` with the remedy if a local weights file is not there. URLs pass."""
    path = path.split("?")[0]
    if path and "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(
            f"{key} is {path!r}, and there is no such file. Give the path of a .pth or .pkl checkpoint, a "
            'detectron2:// or https:// address, or "" to train from scratch'
        )


class LongTailCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that writes atomically and can insist that the weights fit.

    Attributes:
        strict: raise ``ValueError`` when model weights are missing or of another shape, as is right for evaluation
            and for training on top of a finished model; when training starts from a pre-trained backbone,
            Detectron2's warnings are right instead.
    """

    def __init__(self, model, save_dir="", *, strict: bool = False, **kwargs):
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        basename = f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, basename))
        # A kill at any moment leaves either the old file or the new one, and last_checkpoint names a whole file.
        # Always the same name: what a kill leaves behind is overwritten by the next save of that name.
        temporary = os.path.join(self.save_dir, f".{basename}.tmp")
        with open(temporary, "wb") as f:
            torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, os.path.join(self.save_dir, basename))
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        temporary = os.path.join(self.save_dir, ".last_checkpoint.tmp")
        with open(temporary, "w") as f:
            f.write(last_filename_basename)
        os.replace(temporary, os.path.join(self.save_dir, "last_checkpoint"))

    def load(self, path: str, checkpointables: list[str] | None = None):
        check_weights_path(path)
        self._loading, self._resuming = path, checkpointables is None
        return super().load(path, checkpointables=checkpointables)

    def resume_or_load(self, path: str, *, resume: bool = True):
        if resume and self.has_checkpoint():
            self.strict = True
        return super().resume_or_load(path, resume=resume)

    def _load_model(self, checkpoint):
        if self._resuming and "trainer" in checkpoint and "trainer" in self.checkpointables:
            # LongTailTrainer changes its form in the course of a run; Detectron2's trainers do not.
            getattr(self.checkpointables["trainer"], "prepare_to_load", lambda state: None)(checkpoint["trainer"])
        incompatible = super()._load_model(checkpoint)
        # Detectron2 lets heads of another width be trained afresh; a file of which nothing fits is a mistake.
        unfit = set(incompatible.missing_keys) | {name for name, *_ in incompatible.incorrect_shapes}
        nothing = all(name in unfit for name, _ in self.model.named_parameters())
        if nothing or (self.strict and unfit):
            raise ValueError(self._explain(incompatible))
        return incompatible

    def _explain(self, incompatible) -> str:
        lines = [f"the checkpoint {self._loading} does not fit this model:"]
        if incompatible.incorrect_shapes:
            name, found, wanted = incompatible.incorrect_shapes[0]
            lines.append(
                f"  {len(incompatible.incorrect_shapes)} weights differ in shape, first {name}: "
                f"{tuple(found)} in the file, {tuple(wanted)} in the model"
            )
            if "cls_score" in name or "bbox_pred" in name or "predictor" in name:
                lines.append(
                    "  (check MODEL.ROI_HEADS.NUM_CLASSES, and that the loss is of the family it was trained with)"
                )
        for what, keys in (
            ("missing from the file", incompatible.missing_keys),
            ("unknown to the model", incompatible.unexpected_keys),
        ):
            if keys:
                shown = ", ".join(list(keys)[:5]) + (", ..." if len(keys) > 5 else "")
                lines.append(f"  {len(keys)} {what}: {shown}")
        lines.append(
            "Use the config that the checkpoint was trained with (config.yaml beside it), or other MODEL.WEIGHTS."
        )
        return "\n".join(lines)
